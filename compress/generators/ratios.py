"""Mask ratios for training and calibration: a prior over the share of masked tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from compress.errors import CompressError, did_you_mean
from compress.generators.schedules import NAMES, check_schedule, schedule_value

SMALLEST = 1e-3  # the epsilon of MDLM and LLaDA: weights 1/t stay below 1000
PRIORS = ("uniform", "arccos", "truncated_normal", "beta", "cosine", "linear", "log", "exp",
          "pow:2.5")  # fmt: skip
_GRID = 4097


# The law of mask ratios that each weighting was published with.
TRAINING_PRIORS = {"maskgit": "cosine", "mdlm": "uniform", "llada": "uniform"}


def mask_ratios(
    count: int,
    prior: str = "uniform",
    generator: torch.Generator | None = None,
    *,
    spread: bool = True,
    shuffle: bool = False,
    length: int = 256,
) -> Tensor:
    """Draw mask ratios.

    Args:
        count: how many.
        prior: uniform (MDLM, LLaDA); arccos, 2 arccos(u) / pi; any schedule gamma, for gamma(u)
            (cosine is MaskGIT's training law); truncated_normal[:mean,std,low,high], by default
            0.55, 0.25, 0.5, 1 (Li et al. 2023, MAGE, https://arxiv.org/abs/2211.09117);
            beta[:a,b], by default 12, 3 (Ni et al. 2024, ENAT).
        generator: on the CPU.
        spread: low-discrepancy draws u_b = (U + b / B) mod 1 with one U for all (Sahoo et al. 2024,
            MDLM, https://arxiv.org/abs/2406.07524, appendix C.3): each ratio has the same law as
            when drawn alone, their mean has less noise.
        shuffle: in random order; else a spread draw runs through (0, 1] once along the batch.
        length: tokens a sequence, for log and exp.

    Returns:
        float32 [count], in [0.001, 1].

    Raises:
        CompressError: no such prior, or parameters out of range.
    """
    quantile = _quantile(prior, length)
    if spread:
        offset = torch.rand(1, generator=generator, dtype=torch.float64)
        draws = (offset + torch.arange(count, dtype=torch.float64) / max(count, 1)) % 1.0
    else:
        draws = torch.rand(count, generator=generator, dtype=torch.float64)
    if shuffle:
        draws = draws[torch.randperm(count, generator=generator)]
    return quantile(draws).clamp(SMALLEST, 1.0).float()


def check_prior(prior: str) -> str:
    """Return ``prior`` if :func:`mask_ratios` knows it.

    Raises:
        CompressError: it does not.
    """
    _quantile(prior, 256)
    return prior


def _quantile(prior: str, length: int) -> Callable[[Tensor], Tensor]:
    """The function that turns uniform draws into ratios of the prior's law."""
    name, _, text = prior.partition(":")
    if name in NAMES or name == "pow":
        check_schedule(prior)
        return lambda u: _schedule(prior, u, length)
    if name == "uniform" and not text:
        return lambda u: u
    if name == "arccos" and not text:
        return lambda u: torch.arccos(u) * (2 / math.pi)
    if name == "truncated_normal":
        return _truncated_normal(*_numbers(prior, text, (0.55, 0.25, 0.5, 1.0)))
    if name == "beta":
        return _beta(*_numbers(prior, text, (12.0, 3.0)))
    raise CompressError(
        "a prior of mask ratios", repr(prior), did_you_mean(prior, PRIORS)
    )  # fmt: skip


def _schedule(name: str, draws: Tensor, length: int) -> Tensor:
    values = [schedule_value(name, u, length) for u in draws.tolist()]
    return torch.tensor(values, dtype=torch.float64)


def _numbers(prior: str, text: str, defaults: tuple[float, ...]) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split(",")) if text else defaults
    except ValueError:
        numbers = ()
    if len(numbers) != len(defaults) or not all(map(math.isfinite, numbers)):
        name = prior.partition(":")[0]
        example = ",".join(map(str, defaults))
        raise CompressError(f"{len(defaults)} numbers, as in {name}:{example}", repr(prior))
    return numbers


def _truncated_normal(
    mean: float, std: float, low: float, high: float
) -> Callable[[Tensor], Tensor]:
    if std <= 0 or not 0 <= low < high <= 1:
        raise CompressError(
            "truncated_normal:mean,std,low,high with std above 0 and 0 <= low < high <= 1",
            f"{mean}, {std}, {low}, {high}",
        )
    edges = torch.tensor([low, high], dtype=torch.float64)
    first, last = torch.special.ndtr((edges - mean) / std)
    return lambda u: (mean + std * torch.special.ndtri(first + u * (last - first))).clamp(low, high)


def _beta(a: float, b: float) -> Callable[[Tensor], Tensor]:
    """Invert the distribution function on a grid; it is exact to about 1e-6."""
    if a < 1 or b < 1:
        raise CompressError("beta:a,b with a and b of at least 1", f"{a}, {b}")
    grid = torch.linspace(0, 1, _GRID, dtype=torch.float64)
    density = grid ** (a - 1) * (1 - grid) ** (b - 1)
    mass = torch.cat([torch.zeros(1, dtype=torch.float64), (density[1:] + density[:-1]).cumsum(0)])
    mass = mass / mass[-1]

    def quantile(u: Tensor) -> Tensor:
        right = torch.searchsorted(mass, u).clamp(1, _GRID - 1)
        low, high = mass[right - 1], mass[right]
        part = (u - low) / (high - low).clamp_min(1e-300)
        return grid[right - 1] + part.clamp(0, 1) / (_GRID - 1)

    return quantile
