"""Wanda: weights times the norm of what they are multiplied with."""

from __future__ import annotations

from typing import ClassVar

from compress.linear.statistics import MOMENTS
from compress.methods.sparsity.base import SparsityMethod
from compress.methods.work import SiteWork
from compress.models.anatomy import Site


class Wanda(SparsityMethod):
    """Zero the lowest |W_ij| * ||X_j||_2 of each output row, or of each N:M group."""

    name: ClassVar[str] = "wanda"
    summary: ClassVar[str] = "zero weights with small weight x activation norm; no update"
    source: ClassVar[str] = "Sun et al. 2024, arXiv 2306.11695, eq. 1"

    def statistic(self, site: Site) -> str:
        return MOMENTS

    def solve(self, work: SiteWork) -> None:
        for names, statistics in work.groups():
            for name in names:
                score = work.weight(name).abs() * statistics.norm
                self.apply_mask(work, name, self.mask(score))
