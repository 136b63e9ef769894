"""A bound on the likelihood of a masked generator, estimated with few network evaluations.

For a sequence of L free tokens and c_i(S) = -log p(x_i | x outside S), three expectations are equal
(Ou et al. 2024, https://arxiv.org/abs/2406.03736, and Nie et al. 2025, LLaDA,
https://arxiv.org/abs/2502.09992, eq. 14):

    integral   E over t ~ U(0, 1) and S, each token in it with probability t:  1/t sum_{i in S} c_i
    k-uniform  E over k ~ U{1..L} and S uniform of size k:                     L/k sum_{i in S} c_i
    any order  E over orders: the negative log-likelihood decoded in that order

Their value bounds the negative log-likelihood of random-order decoding from above. The second has
the smaller variance (that of the first diverges at t -> 0), and a control variate takes away what
is left of the differences between tokens: for any numbers b_i that do not depend on S,

    sum_i b_i + L/k sum_{i in S} (c_i - b_i)

has the same expectation. Here b_i is the code length of x_i by its frequency in the data that are
scored, which costs no network evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from compress.errors import CompressError
from compress.eval.quality.denoising import WHERE, Denoise, Sequences, hidden_nll
from compress.eval.quality.masks import stratified_counts, uniform_mask
from compress.eval.quality.stats import serial_mean

Estimator = Literal["k-uniform", "integral", "integral-spread"]


class LikelihoodResult(BaseModel):
    """A negative log-likelihood or a bound on it; errors are over sequences."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rule: str = Field(description='"any order" (the bound), or the order of exact decoding')
    nats: float = Field(description="nats per token")
    nats_stderr: float | None
    perplexity: float = Field(description="exp(nats)")
    perplexity_interval: tuple[float, float] | None = Field(description="95 % interval")
    bits_per_token: float
    bits_per_byte: float | None = None
    sequences: int
    tokens: int = Field(description="tokens that were predicted")
    window: int = Field(description="tokens per sequence, condition included")
    draws: int = Field(description="masks a sequence (any order), or 1")
    estimator: Estimator | None = None
    control: bool = Field(default=False, description="token frequencies as control variate")
    seed: int | None = None
    evaluations: int = Field(description="sequences that went through the network")
    window_nll: list[float] = Field(
        description="nats per token of each sequence, so that two models can be compared pairwise"
    )
    window_tokens: list[int] | None = Field(
        default=None, description="predicted tokens of each sequence; None in older results"
    )


def likelihood_bound(
    denoise: Denoise,
    data: Sequences,
    mask_id: int,
    *,
    draws: int = 8,
    estimator: Estimator = "k-uniform",
    control: bool = True,
    seed: int = 0,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> LikelihoodResult:
    """Estimate the bound on the negative log-likelihood of ``data``.

    The masks depend on ``seed`` and the shape of the data alone: two models see the same ones.

    Args:
        denoise: ids [rows, length] to logits [rows, length, vocabulary].
        data: a conditional likelihood where some positions are not free.
        draws: masks for each sequence.
        estimator: "k-uniform" with k spread evenly; "integral" (t drawn independently) and
            "integral-spread" (t spread evenly over all draws, as MDLM evaluates) are there for
            comparison.
        control: use the control variate; the expectation is the same without.

    Raises:
        CompressError: draws below 1, or what :func:`hidden_nll` refuses.
    """
    if draws < 1:
        raise CompressError("at least one draw per sequence", str(draws), where=WHERE)
    masks, weights = draw_masks(data, draws, estimator, torch.Generator().manual_seed(seed))
    rows = torch.arange(len(data)).repeat_interleave(draws)
    expected = _frequency_nats(data) if control else torch.zeros(data.tokens.shape).double()
    nats = expected[rows].sum(dim=1)
    done = 0
    for part, length in data.batches(batch_size, rows):
        hidden = masks[part, :length]
        if hidden.any():
            nll, _ = hidden_nll(denoise, data.tokens[rows[part], :length], hidden, mask_id)
            nll -= expected[rows[part], :length] * hidden
            nats[part] += nll.sum(dim=1) * weights[part]
        done += len(part)
        if progress:
            progress(done, len(rows))
    return likelihood_result(
        nats.view(-1, draws).mean(dim=1), data, rule="any order", draws=draws,
        estimator=estimator, control=control, seed=seed, evaluations=len(rows),
    )  # fmt: skip


def _frequency_nats(data: Sequences) -> Tensor:
    """-log of each free token's share of all free tokens, float64 [rows, length]; 0 elsewhere."""
    _, kinds, counts = data.tokens[data.free].unique(return_inverse=True, return_counts=True)
    nats = torch.zeros(data.tokens.shape, dtype=torch.float64)
    nats[data.free] = (counts.sum() / counts.double()).log()[kinds]
    return nats


def draw_masks(
    data: Sequences, draws: int, estimator: Estimator, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Masks bool [rows * draws, length] and the weights float64 [rows * draws] of their sums."""
    lengths = data.lengths
    free = data.free.repeat_interleave(draws, dim=0)
    if estimator == "k-uniform":
        counts = stratified_counts(lengths, draws, generator).flatten()
        weights = lengths.repeat_interleave(draws).double() / counts
        return uniform_mask(counts, free, generator), weights
    uniform = torch.rand(len(free), generator=generator, dtype=torch.float64)
    if estimator == "integral-spread":
        uniform = (torch.randperm(len(free), generator=generator) + uniform) / len(free)
    # 1 - U lies in (0, 1]: a ratio of exactly zero has no weight.
    ratio = 1 - uniform
    hidden = torch.rand(free.shape, generator=generator, dtype=torch.float64) < ratio[:, None]
    return hidden & free, 1 / ratio


def likelihood_result(
    nats: Tensor,
    data: Sequences,
    *,
    rule: str,
    evaluations: int,
    draws: int = 1,
    estimator: Estimator | None = None,
    control: bool = False,
    seed: int | None = None,
) -> LikelihoodResult:
    """Make a result of the nats of each sequence, float64 [rows]."""
    counts = data.lengths.tolist()
    mean, error, _ = found = serial_mean(nats.tolist(), counts)
    bounds = found.interval
    return LikelihoodResult(
        rule=rule,
        nats=mean,
        nats_stderr=error,
        perplexity=_exp(mean),
        perplexity_interval=bounds and (_exp(bounds[0]), _exp(bounds[1])),
        bits_per_token=mean / math.log(2),
        bits_per_byte=mean / math.log(2) / data.bytes_per_token if data.bytes_per_token else None,
        sequences=len(counts),
        tokens=sum(counts),
        window=data.tokens.shape[1],
        draws=draws,
        estimator=estimator,
        control=control,
        seed=seed,
        evaluations=evaluations,
        window_nll=(nats / data.lengths).tolist(),
        window_tokens=counts,
    )


def _exp(nats: float) -> float:
    """exp that saturates, since JSON has no infinity."""
    return math.exp(min(nats, 700.0))
