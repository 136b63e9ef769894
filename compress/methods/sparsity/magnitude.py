"""Magnitude pruning: the smallest weights go. Needs no data."""

from __future__ import annotations

from typing import ClassVar

from compress.methods.sparsity.base import SparsityMethod
from compress.methods.work import SiteWork


class Magnitude(SparsityMethod):
    """Zero the smallest absolute weights of each matrix (unstructured) or each N:M group."""

    name: ClassVar[str] = "magnitude"
    summary: ClassVar[str] = "zero the smallest weights; no data needed"
    source: ClassVar[str] = "Han et al. 2015, arXiv 1506.02626"
    needs: ClassVar[str] = "nothing"

    def solve(self, work: SiteWork) -> None:
        for names, _ in work.groups():
            for name in names:
                score = work.weight(name).abs()
                if self.parsed is not None:
                    mask = self.mask(score)
                else:
                    # One threshold a matrix, not a row: rows compete with each other.
                    mask = self.mask(score.reshape(1, -1)).reshape(score.shape)
                self.apply_mask(work, name, mask)
