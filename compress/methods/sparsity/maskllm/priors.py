"""One-shot N:M masks that the learning of masks may start from."""

from __future__ import annotations

from pathlib import Path

import torch

from compress.checkpoint.mask_file import mask_layout, read_mask
from compress.errors import CompressError, did_you_mean
from compress.linear.algebra import inverse_cholesky
from compress.linear.pattern import Pattern
from compress.linear.statistics import GRAM, MOMENTS, NOTHING, InputStatistics
from compress.linear.sweep import Pruning, sweep
from compress.methods.sparsity.maskllm.search import local_search

_KINDS = {
    "magnitude": NOTHING,
    "wanda": MOMENTS,
    "sparsegpt": GRAM,
    "search": GRAM,
    "none": NOTHING,
}
PRIORS = tuple(_KINDS)
_DAMPING = 0.01  # of SparseGPT's Hessian, as in the paper


def prior_statistic(prior: str) -> str:
    """What a prior must know of a linear's inputs; nothing for a mask file."""
    return _KINDS.get(prior, NOTHING)


def prior_mask(
    prior: str,
    weight: torch.Tensor,
    statistics: InputStatistics | None,
    pattern: Pattern,
    label: str,
) -> torch.Tensor | None:
    """The prior's mask of a weight [out, in], bool; None for the prior ``none``.

    Args:
        prior: one of :data:`PRIORS` or a mask file. label: the linear's path in the model.
    """
    if prior == "none":
        return None
    if prior not in _KINDS:
        return read_mask(prior, f"{label}.weight").to(weight.device)
    if prior == "magnitude":
        return pattern.mask(weight.abs())
    if prior == "sparsegpt":
        return _sparsegpt(weight, statistics.gram, pattern, label)
    mask = pattern.mask(weight.abs() * statistics.norm)
    return local_search(weight, statistics.gram, mask, pattern) if prior == "search" else mask


def _sparsegpt(
    weight: torch.Tensor, gram: torch.Tensor, pattern: Pattern, label: str
) -> torch.Tensor:
    upper, dead = inverse_cholesky(gram, _DAMPING, label)
    rounding = _Recorded(pattern, pattern.sparsity, [len(weight)], dead)
    size = -(-128 // pattern.m) * pattern.m
    sweep(weight, upper, rounding, size)
    return torch.cat(rounding.masks).t()


class _Recorded(Pruning):
    """SparseGPT's rounding, which keeps the masks it chose: kept weights may be zero."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.masks: list[torch.Tensor] = []

    def column(self, index: int, value: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
        rounded = super().column(index, value, block)
        if (index - self.start) % self.pattern.m == 0:
            self.masks.append(self.mask)
        return rounded


def check_prior_file(prior: str, shapes: dict[str, tuple[int, int]], pattern: Pattern) -> None:
    """Refuse a mask file that does not cover the linears of a step.

    Args:
        shapes: path of each linear in the model -> (out, in).

    Raises:
        CompressError: no such file, a damaged one, a linear without a mask, a mask of another shape
            or pattern.
    """
    if prior in _KINDS:
        return
    if not Path(prior).is_file():
        raise CompressError(
            "the mask file that `prior` names", f"no file {prior}",
            "Run the recipe that writes it first, or set prior to one of " + ", ".join(PRIORS),
        )  # fmt: skip
    layout = mask_layout(prior)
    for label, shape in shapes.items():
        info = layout.get(f"{label}.weight")
        if info is None:
            raise CompressError(
                f"a mask of {label}.weight in the prior {prior}",
                f"{len(layout)} masks of other weights",
                did_you_mean(f"{label}.weight", list(layout)) or "Exclude the linear",
            )
        if tuple(info.shape) != shape or str(info.pattern) != str(pattern):
            raise CompressError(
                f"a {pattern} mask of {list(shape)} for {label} in the prior {prior}",
                f"a {info.pattern} mask of {list(info.shape)}",
                "Use the mask file of a run on the same model with the same pattern",
            )
