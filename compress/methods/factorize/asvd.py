"""ASVD: SVD of a weight whose columns are scaled by how large their inputs are."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from compress.linear.algebra import principal_outputs
from compress.linear.statistics import MAGNITUDES, InputStatistics
from compress.methods.factorize.base import FactorizeMethod
from compress.models.anatomy import Site


class ASVD(FactorizeMethod):
    """Truncate the SVD of W D, with D = diag(mean |x_j|^alpha).

    The ranks are the same share of every matrix; the paper's search for ranks by sensitivity is
    not part of this.
    """

    name: ClassVar[str] = "asvd"
    summary: ClassVar[str] = "low-rank factors that favour large inputs"
    source: ClassVar[str] = "Yuan et al. 2023, arXiv 2312.05821 (activation-aware scaling)"

    alpha: float = Field(0.5, ge=0, description="Exponent of the mean absolute input.")

    def statistic(self, site: Site) -> str:
        return MAGNITUDES

    def directions(
        self, weight: torch.Tensor, rank: int, statistics: InputStatistics | None, label: str
    ) -> tuple[torch.Tensor, float]:
        return principal_outputs(weight, rank, scale=statistics.mean_absolute**self.alpha)
