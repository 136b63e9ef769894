"""Which tokens are hidden: seeded draws on the CPU, the same for every model that is compared."""

from __future__ import annotations

import torch
from torch import Tensor


def uniform_mask(counts: Tensor, free: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a uniformly random set of ``counts[row]`` of the free positions in every row.

    Args:
        counts: int64 [rows], each between 0 and the number of free positions of its row.
        free: bool [rows, length], positions that may be hidden.

    Returns:
        bool [rows, length], True where a token is hidden.
    """
    order = torch.rand(free.shape, generator=generator).masked_fill(~free, 2.0)
    return (order.argsort(dim=1).argsort(dim=1) < counts[:, None]) & free


def share_mask(ratio: float, free: Tensor, generator: torch.Generator) -> Tensor:
    """Hide the share ``ratio`` of the free positions of every row, at least one of them."""
    counts = (ratio * free.sum(dim=1)).round().long().clamp(min=1)
    return uniform_mask(torch.minimum(counts, free.sum(dim=1)), free, generator)


def stratified_counts(free: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Draw for every row ``draws`` numbers from 1..L (L: its free positions), spread evenly.

    Each number is uniform on 1..L, so an average over them is unbiased, but together they cover the
    range: over the draws of a row (systematic sampling with a random start) and over the rows
    (whose starts are spread too). What is left of the variance is that of the set of a given size.

    Args:
        free: int64 [rows], each at least 1.

    Returns:
        int64 [rows, draws].
    """
    rows = len(free)
    start = torch.randperm(rows, generator=generator) + torch.rand(rows, generator=generator)
    at = (torch.arange(draws) + start.double()[:, None] / rows) / draws
    return (at * free[:, None]).floor().long().clamp(max=free[:, None] - 1) + 1
