"""FWSVD: SVD of a weight whose rows are weighted by how much the loss depends on them."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import nn

from compress.errors import CompressError
from compress.linear.algebra import principal_outputs
from compress.linear.matrix import is_conv1d, is_linear
from compress.methods.factorize.base import FactorizeMethod, low_rank_pair
from compress.methods.passes import Pass, Shapes, Sites, Stream, TrainModel
from compress.methods.work import SiteWork
from compress.models.anatomy import Anatomy
from compress.models.outline import Outline
from compress.train.fisher import row_fisher
from compress.train.options import TrainingOptions
from compress.train.whole import ModelWork

_FLOOR = 1e-3  # of the mean weight: rows that no gradient reached are divided by it


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
        if not outline.predicts:
            raise CompressError(
                "a model with a head, whose loss the Fisher information is of",
                f"a {anatomy.model_type} without the head of a language model or of labels",
                "Use svd_llm, which needs no loss",
            )

    def passes(self) -> tuple[Pass, ...]:
        # A gradient a window: as long as so many steps of one.
        options = ((TrainingOptions(steps=self.windows, batch=1), 1.0),)
        mark = Sites(self.targets, _mark)
        return (
            TrainModel(mark, self.estimate, _take, options, _gradient_bytes),
            Stream((self.sites,), inputs=False),
        )

    def solving_bytes(self, shapes: Shapes, gram: bool) -> int:
        # The weighted weight, twice, in float64.
        return super().solving_bytes(shapes, gram) + 16 * max(a * b for a, b in shapes)

    def estimate(self, work: ModelWork) -> None:
        """Leave the rows' information on the linears that the step targets."""
        linears = {n: m for n, m in work.model.named_modules() if hasattr(m, _MARK)}
        found = row_fisher(work, {n: m.weight for n, m in linears.items()}, self.windows)
        for name, module in linears.items():
            setattr(module, _MARK, found[name].sum(0 if is_conv1d(module) else 1))

    def solve(self, work: SiteWork) -> None:
        for name in work.names:
            weight = work.weight(name)
            rank = self.prepared(work, name)
            if rank == 0:
                continue
            rows = work.learned[name].to(weight.device).double().sqrt()
            rows = rows.clamp_min(_FLOOR * rows.mean().clamp_min(1e-30))
            basis, lost = principal_outputs(rows[:, None] * weight, rank)
            # U U^T diag(f) W, and diag(f)^-1 before it.
            first, second = basis.t() @ (rows[:, None] * weight), basis / rows[:, None]
            work.replace(name, low_rank_pair(work.linear(name), first, second))
            work.metrics[f"{name}.rank"] = rank
            work.metrics[f"{name}.error"] = lost


_MARK = "fisher"  # attribute of a linear meanwhile


def _mark(work: SiteWork) -> None:
    for name in work.names:
        if is_linear(work.linear(name)):
            setattr(work.linear(name), _MARK, torch.zeros(0))


def _take(block: nn.Module) -> dict[str, torch.Tensor]:
    """The information of a block's linears, by name; what was left on them is taken off."""
    found = {}
    for name, module in block.named_modules():
        if hasattr(module, _MARK):
            found[name] = getattr(module, _MARK).cpu()
            delattr(module, _MARK)
    return found


def _gradient_bytes(shapes: Shapes) -> int:
    """A gradient, and the sum of its squares."""
    return 8 * sum(out * width for out, width in shapes)
