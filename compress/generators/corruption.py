"""Masking of clean sequences: how many tokens, and which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.generators.description import MaskedGeneration
from compress.generators.masking import IGNORE

Generators = torch.Generator | Sequence[torch.Generator] | None
_GUARD = 1e-6  # float32 ratios: 0.3 * 10 is 3, not 4


def draw(rows: int, length: int, generator: Generators) -> Tensor:
    """Uniform numbers, float64 [rows, length] on the CPU.

    Args:
        generator: one for all, or one a row: then a row's numbers do not depend on the others.
    """
    if isinstance(generator, Sequence):
        if len(generator) != rows:
            raise CompressError(f"{rows} generators, one a row", str(len(generator)))
        return torch.stack(
            [torch.rand(length, generator=g, dtype=torch.float64) for g in generator]
        )
    return torch.rand(rows, length, generator=generator, dtype=torch.float64)


def corrupt(
    ids: Tensor,
    spec: MaskedGeneration,
    ratios: Tensor | float,
    generator: Generators = None,
    fixed: Tensor | None = None,
    *,
    law: Literal["exact", "bernoulli"] | None = None,
) -> tuple[Tensor, Tensor]:
    """Mask a share of each row.

    Args:
        ids: int64 [rows, length], clean.
        spec: what may be masked: the tokens that may be produced, the class token apart.
        ratios: [rows] or one number, in (0, 1].
        generator: one, or one a row; on the CPU.
        fixed: bool [length] or [rows, length], more positions that stay visible (a prompt,
            padding).
        law: exact masks ceil(ratio * eligible) tokens, at least one (MaskGIT); bernoulli masks each
            token with probability ratio (MDLM), so that a row may have none. By default bernoulli
            for the weightings mdlm and llada, whose bound assumes it, and exact for maskgit.

    Returns:
        Masked ids and labels, int64 [rows, length]; labels are -100 where a token is visible.

    Raises:
        CompressError: ratios out of range, or a row with nothing to mask.
    """
    ratios = torch.as_tensor(ratios, dtype=torch.float64).cpu().expand(len(ids))
    if not bool(((ratios > 0) & (ratios <= 1)).all()):
        raise CompressError("mask ratios above 0 and at most 1", str(ratios.tolist())[:100])
    free = eligible(ids, spec, fixed).cpu()
    law = law or ("exact" if spec.weighting == "maskgit" else "bernoulli")
    scores = draw(*ids.shape, generator)
    independent = (scores < ratios[:, None]) & free
    hidden = _lowest(scores, free, ratios) if law == "exact" else independent
    hidden = hidden.to(ids.device)
    return ids.masked_fill(hidden, spec.mask_id), ids.masked_fill(~hidden, IGNORE)


def eligible(ids: Tensor, spec: MaskedGeneration, fixed: Tensor | None = None) -> Tensor:
    """Positions that may be masked: bool [rows, length].

    Raises:
        CompressError: a row without any.
    """
    free = ~spec.fixed(ids)
    if fixed is not None:
        free &= ~fixed.to(ids.device).expand(ids.shape)
    empty = (free.sum(dim=1) == 0).nonzero()
    if len(empty):
        raise CompressError(
            "a token to mask in each row", f"row {int(empty[0])}, whose tokens all stay visible",
            "Leave such rows out, or make the prompt shorter",
        )  # fmt: skip
    return free


def nested_masks(free: Tensor, ratios: Tensor, generator: Generators = None) -> Tensor:
    """Masks of several ratios of which the larger contain the smaller.

    One random order a row serves all its ratios: what a teacher sees more of than its student
    differs by tokens revealed, not by another draw.

    Args:
        free: bool [rows, length], what may be masked.
        ratios: [rows, masks], each in (0, 1].

    Returns:
        bool [masks, rows, length].
    """
    scores = draw(*free.shape, generator)
    columns = torch.as_tensor(ratios, dtype=torch.float64).cpu().unbind(dim=1)
    return torch.stack([_lowest(scores, free.cpu(), column) for column in columns]).to(free.device)


def _lowest(scores: Tensor, free: Tensor, ratios: Tensor) -> Tensor:
    """The ceil(ratio * free) positions of the lowest scores of each row."""
    available = free.sum(dim=1)
    counts = (available * ratios - _GUARD).ceil().clamp(min=1).minimum(available)
    rank = scores.masked_fill(~free, 2.0).argsort(dim=1, stable=True).argsort(dim=1)
    return (rank < counts[:, None]) & free
