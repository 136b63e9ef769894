"""SVD-LLM: SVD of a weight with whitened inputs."""

from __future__ import annotations

from typing import ClassVar

import torch

from compress.linear.algebra import principal_outputs
from compress.linear.statistics import GRAM, InputStatistics
from compress.methods.factorize.base import FactorizeMethod
from compress.methods.passes import Effort, Shapes
from compress.models.anatomy import Site


class SVDLLM(FactorizeMethod):
    """Truncate the SVD of W L, with L L^T = X X^T: the least error of the outputs at a given rank.

    What is lost, ||W X - W' X||, is the root of the sum of squares of the singular values dropped.
    """

    name: ClassVar[str] = "svd_llm"
    summary: ClassVar[str] = "low-rank factors with the least output error on calibration inputs"
    source: ClassVar[str] = "Wang et al. 2024, arXiv 2403.07378 (whitening, without the update)"

    def statistic(self, site: Site) -> str:
        return GRAM

    def solving_work(self, shapes: Shapes) -> Effort:
        metric = super().solving_work(shapes).products
        for out, width in shapes:
            metric += 3 * out * width**2 + (18 * width**3 if out > width else 0)
        return Effort(metric)

    def directions(
        self, weight: torch.Tensor, rank: int, statistics: InputStatistics | None, label: str
    ) -> tuple[torch.Tensor, float]:
        return principal_outputs(weight, rank, gram=statistics.gram, what=label)
