"""FWSVD: SVD of a weight whose rows are weighted by how much the loss depends on them."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from compress.linear.algebra import principal_outputs
from compress.methods.factorize.base import FactorizeMethod, low_rank_pair
from compress.methods.factorize.information import (
    check_loss,
    information_pass,
    output_weights,
)
from compress.methods.passes import Pass, Shapes, Stream
from compress.methods.work import SiteWork
from compress.models.anatomy import Anatomy
from compress.models.outline import Outline


class FWSVD(FactorizeMethod):
    """Truncate the SVD of diag(f) W, f_i^2 the sum of a row's Fisher information.

    The information is the mean square of the loss's gradient over calibration windows, for which
    the whole model is in memory once. Weights are per row, as in the paper: with one for each entry
    there is no closed form.
    """

    name: ClassVar[str] = "fwsvd"
    summary: ClassVar[str] = "low-rank factors that favour the outputs on which the loss depends"
    source: ClassVar[str] = "Hsu et al. 2022, arXiv 2207.00112, eq. 5-7"

    windows: int = Field(
        64, ge=1, description="Calibration sequences, at most, whose gradients are taken."
    )

    def check(self, anatomy: Anatomy, outline: Outline) -> None:
        super().check(anatomy, outline)
        check_loss(self.name, anatomy, outline, "Use svd_llm, which needs no loss")

    def passes(self) -> tuple[Pass, ...]:
        return information_pass(self.targets, self.windows), Stream((self.sites,), inputs=False)

    def solving_bytes(self, shapes: Shapes, gram: bool) -> int:
        # The weighted weight, twice, in float64.
        return super().solving_bytes(shapes, gram) + 16 * max(a * b for a, b in shapes)

    def solve(self, work: SiteWork) -> None:
        for name in work.names:
            weight = work.weight(name)
            rank = self.prepared(work, name)
            if rank == 0:
                continue
            rows = output_weights(work, name)
            rows = rows / rows.mean()  # of no influence but on how large each factor is
            basis, lost = principal_outputs(rows[:, None] * weight, rank)
            # U U^T diag(f) W, and diag(f)^-1 before it.
            first, second = basis.t() @ (rows[:, None] * weight), basis / rows[:, None]
            work.replace(name, low_rank_pair(work.linear(name), first, second))
            work.metrics[f"{name}.rank"] = rank
            work.metrics[f"{name}.error"] = lost
