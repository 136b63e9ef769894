"""SparseGPT: pruning with the kept weights updated to make up for the pruned ones."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from compress.linear.algebra import inverse_cholesky
from compress.linear.matrix import is_sparse
from compress.linear.statistics import GRAM
from compress.linear.sweep import Pruning, sweep, sweep_bytes, sweep_work
from compress.methods.passes import Effort, Shapes
from compress.methods.sparsity.base import SparsityMethod
from compress.methods.work import SiteWork
from compress.models.anatomy import Site


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

    def solving_bytes(self, shapes: list[tuple[int, int]], gram: bool) -> int:
        return sweep_bytes(shapes, copies=4)

    def solving_work(self, shapes: Shapes) -> Effort:
        return Effort(*sweep_work(shapes))

    def solve(self, work: SiteWork) -> None:
        for names, statistics in work.groups():
            # Linears that read one input share the factor, and their rows one sweep.
            upper, dead = inverse_cholesky(statistics.gram, self.damping, work.label(names[0]))
            weights = [work.weight(name) for name in names]
            stacked = torch.cat(weights)
            sizes = [len(w) for w in weights]
            # Error feedback would fill the zeros of an earlier step again.
            sparse = any(is_sparse(work.linear(name)) for name in names)
            zeros = stacked == 0 if sparse else None
            rounding = Pruning(self.parsed, self.share, sizes, dead, zeros)
            group = self.parsed.m if self.parsed else 1
            size = -(-self.block_size // group) * group
            solved = sweep(stacked, upper, rounding, size)
            for name, weight, rows in zip(names, weights, solved.split(sizes), strict=True):
                weight.copy_(rows)
                self.mark(work, name)
