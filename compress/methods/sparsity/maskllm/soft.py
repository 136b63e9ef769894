"""Relaxed masks: drawn at random, multiplied with a weight, differentiated, in few passes.

What learns is a tensor of logits [C, G]: for each of a weight's G groups of M inputs, how probable
its C legal masks are. With fast matrix products it is not they that a training step waits for but
the drawing of masks, C random numbers and three transcendental functions a group. So there is one
pool of noise for all weights of a step, and everything between logits and masked weight is done for
some ten thousand groups at a time, which stay in the processor's cache.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from compress.linear.pattern import Pattern
from compress.train.moment import derive_seed

_TINY = 1e-20  # keeps log(-log U) finite
# Values that are in work at once: on CPUs what fits the cache, on GPUs what fills the units.
_SPAN = {"cpu": 2**19}
_SPAN_ELSEWHERE = 2**22
# Candidates times weights of a group up to which sums are cheaper than a product (2:4 has 24).
_FEW = 24


@functools.cache
def candidates(pattern: Pattern) -> torch.Tensor:
    """All legal masks of a group, float32 [C, M], lexicographic in the kept positions."""
    rows = torch.zeros(pattern.candidates, pattern.m)
    for row, kept in zip(rows, itertools.combinations(range(pattern.m), pattern.n), strict=True):
        row[list(kept)] = 1
    return rows


def gumbel(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Standard Gumbel noise, -log(-log U), on the generator's device."""
    uniform = torch.rand(shape, generator=generator, device=generator.device)
    return uniform.clamp_(_TINY, 1 - 2**-24).log_().neg_().log_().neg_()


@dataclass(frozen=True)
class Noise:
    """Gumbel noise for the groups of one weight, out of a pool that all weights of a step share.

    The noise of every group is exact and as fresh as the pool. What is given up is that all groups
    be independent: some, far apart, have the same noise in one draw, and other partners in the
    next.

    Attributes:
        seed: of the pool. stream: tells weights apart, which start at places of their own.
    """

    seed: int
    stream: int = 0

    def piece(self, number: int, rows: int, width: int, device: torch.device) -> torch.Tensor:
        """[rows, width] for piece ``number`` of a weight's groups; not to be written to."""
        pool = _pool(self.seed, rows, str(device))
        start = derive_seed(self.seed, self.stream, number) % (pool.shape[1] // 2)
        return pool[:, start : start + width]


@functools.lru_cache(maxsize=1)
def _pool(seed: int, rows: int, device: str) -> torch.Tensor:
    """Noise [rows, 2 * span], twice the same, so that a piece may start anywhere."""
    generator = torch.Generator(device).manual_seed(seed % 2**63)
    once = gumbel((rows, _span(rows, torch.device(device))), generator)
    return torch.cat([once, once], 1)


def _span(rows: int, device: torch.device) -> int:
    """Groups of ``rows`` candidates that are in work at once."""
    return max(1, _SPAN.get(device.type, _SPAN_ELSEWHERE) // rows)


def masked_weight(
    weight: torch.Tensor,
    logits: torch.Tensor,
    pattern: Pattern,
    kappa: float,
    tau: float,
    noise: Noise | torch.Tensor | None = None,
) -> torch.Tensor:
    """A weight times its relaxed mask (equations 5 and 6).

    The mask of a group is the mean of its candidates under softmax((kappa * logits + noise) / tau);
    its entries are in [0, 1] and sum to N.

    Args:
        weight: float32 [out, in], taken as constant.
        logits: float32 [C, out * in / M]; gradients flow to it.
        kappa: scale of the logits against the noise. tau: temperature, towards 0 a hard mask.
        noise: where it comes from, or itself [C, G]; None for none.

    Returns:
        [out, in], in the type of matrix products where autocast is on, else float32. The masks are
        computed in float32 either way, and so is the gradient.
    """
    kind, dtype = weight.device.type, weight.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    masks = candidates(pattern).to(weight.device)
    return _MaskedWeight.apply(logits, weight, masks, kappa, tau, noise, dtype)


def _without_autocast(function: Callable) -> Callable:
    """Let one half of an autograd function compute in the types of what it is given."""

    @functools.wraps(function)
    def plain(ctx, first, *rest):
        with torch.autocast(first.device.type, enabled=False):
            return function(ctx, first, *rest)

    return plain


class _MaskedWeight(torch.autograd.Function):
    """Keeps one tensor [C, G] for the backward pass, the candidates' shares.

    Composed from torch's operations the same takes four of that size, and they are the largest
    tensors of mask learning (1.5 values a weight at 2:4, 8.75 at 4:8).
    """

    @staticmethod
    @_without_autocast
    def forward(ctx, logits, weight, masks, kappa, tau, noise, dtype):
        out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        dense, result = weight.reshape(-1, masks.shape[1]), out.view(-1, masks.shape[1])
        shares = []
        for number, piece in enumerate(_pieces(*logits.shape, logits.device)):
            share = logits[:, piece] * (kappa / tau)
            if isinstance(noise, Noise):
                share.add_(noise.piece(number, *share.shape, share.device), alpha=1 / tau)
            elif noise is not None:
                share.add_(noise[:, piece], alpha=1 / tau)
            share = torch.softmax(share, 0)
            torch.mul(dense[piece], _combined(masks.t(), share).t(), out=result[piece])
            shares.append(share)
        ctx.save_for_backward(dense, masks, *shares)
        ctx.slope = kappa / tau
        return out

    @staticmethod
    @_without_autocast
    def backward(ctx, grad):
        dense, masks, *shares = ctx.saved_tensors
        result = torch.empty(len(masks), len(dense), dtype=dense.dtype, device=dense.device)
        grad = grad.reshape(dense.shape)
        for piece, share in zip(_pieces(*result.shape, result.device), shares, strict=True):
            # Cast first: a product of two types takes longer.
            into = _combined(masks, (grad[piece].to(dense.dtype) * dense[piece]).t())
            into.sub_((share * into).sum(0, keepdim=True)).mul_(share)
            torch.mul(into, ctx.slope, out=result[:, piece])
        return result, None, None, None, None, None, None


def _combined(chosen: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``chosen`` [R, K], of zeros and ones, times ``rows`` [K, W].

    So thin a product gains nothing from a second thread, or loses by it. A few sums of long rows
    take half its time there and give the same bits.
    """
    if rows.device.type != "cpu" or chosen.numel() > _FEW:
        return chosen @ rows
    result = rows.new_empty(len(chosen), rows.shape[1])
    for total, flags in zip(result, chosen.tolist(), strict=True):
        first, *others = (row for row, flag in zip(rows, flags, strict=True) if flag)
        if others:
            torch.add(first, others[0], out=total)
        else:
            total.copy_(first)
        for row in others[1:]:
            total.add_(row)
    return result


def _pieces(rows: int, groups: int, device: torch.device) -> Iterator[slice]:
    width = _span(rows, device)
    return (slice(at, min(groups, at + width)) for at in range(0, groups, width))
