"""SparseGPT: pruning with the kept weights updated to make up for the pruned ones."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from compress.calibrate.statistics import GRAM
from compress.linalg import inverse_cholesky
from compress.methods.base import SiteWork
from compress.methods.sparsity.pattern import SparsityMethod
from compress.models.anatomy import Site
from compress.patterns import Pattern
from compress.solvers import sweep


class SparseGPT(SparsityMethod):
    """One-shot pruning with optimal-brain-surgeon updates."""

    name: ClassVar[str] = "sparsegpt"
    summary: ClassVar[str] = "zero weights and update the others against the Hessian of the inputs"
    source: ClassVar[str] = "Frantar & Alistarh 2023, arXiv 2301.00774, Algorithm 1"

    damping: float = Field(
        0.01, gt=0, description="Share of the mean of the Hessian's diagonal added to it."
    )
    block_size: int = Field(
        128, gt=0, description="Columns in which a mask is chosen at once (unstructured)."
    )

    def statistic(self, site: Site) -> str:
        return GRAM

    def solve(self, work: SiteWork) -> None:
        for names, statistics in work.groups():
            # Linears that read one input share the factor, and their rows one sweep.
            upper, dead = inverse_cholesky(statistics.gram, self.damping, work.label(names[0]))
            weights = [work.weight(name) for name in names]
            stacked = torch.cat(weights)
            sizes = [len(w) for w in weights]
            rounding = _Pruning(self.parsed, self.share, sizes, dead)
            group = self.parsed.m if self.parsed else 1
            size = -(-self.block_size // group) * group
            solved = sweep(stacked, upper, rounding, size)
            for name, weight, rows in zip(names, weights, solved.split(sizes), strict=True):
                weight.copy_(rows)
                self.mark(work, name)


class _Pruning:
    """Zeroes columns of several stacked matrices; see :class:`compress.solvers.Rounding`.

    Weights on features that were never active (``dead``) cost nothing: they go first, but no more
    of them than the sparsity asks for, since other texts may need them.
    """

    def __init__(
        self, pattern: Pattern | None, share: float, sizes: list[int], dead: torch.Tensor
    ) -> None:
        self.pattern, self.share, self.sizes, self.dead = pattern, share, sizes, dead

    def enter(self, start: int, stop: int, block: torch.Tensor, diagonal: torch.Tensor) -> None:
        self.start, self.diagonal = start, diagonal
        if self.pattern is not None:
            return
        # One threshold over all rows and columns of the block, for each matrix by itself.
        score = (block / diagonal[:, None]).square()
        score[self.dead[start:stop]] = 0
        masks = []
        for part in score.split(self.sizes, dim=1):
            drop = int(self.share * part.numel())
            if drop == 0:
                masks.append(torch.ones_like(part, dtype=torch.bool))
                continue
            flat = part.reshape(-1)
            lowest = flat.topk(drop, largest=False, sorted=False).indices
            keep = torch.ones_like(flat, dtype=torch.bool).index_fill_(0, lowest, False)
            masks.append(keep.reshape(part.shape))
        self.mask = torch.cat(masks, dim=1)

    def column(self, index: int, value: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
        i = index - self.start
        if self.pattern is None:
            return value * self.mask[i]
        group = self.pattern.m
        if i % group == 0:
            # N:M masks are chosen when their group is reached, on the weights as updated so far.
            score = (block[i : i + group] / self.diagonal[i : i + group, None]).square()
            score[self.dead[index : index + group]] = 0
            self.mask = self.pattern.mask(score.t()).t()
        return value * self.mask[i % group]
