"""How much the loss depends on each output of a linear: a pass over the whole model that finds it,
and what later passes of the step read of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from compress.errors import CompressError
from compress.linear.matrix import is_conv1d, is_linear
from compress.methods.passes import Shapes, Sites, TrainModel
from compress.methods.work import SiteWork
from compress.models.anatomy import Anatomy, BlockAnatomy, Site
from compress.models.outline import Outline
from compress.train.fisher import row_fisher
from compress.train.options import TrainingOptions
from compress.train.whole import ModelWork

_MARK = "fisher"  # attribute of a linear meanwhile
_FLOOR = 1e-3  # of the mean weight: rows that no gradient reached are divided by it


def information_pass(
    targets: Callable[[BlockAnatomy, Site], tuple[str, ...]], windows: int
) -> TrainModel:
    """Sum the Fisher information of each row of the targeted weights.

    The information is the mean square of the loss's gradient over calibration windows, for which
    the whole model is in memory once. :func:`output_weights` finds it in later passes.
    """

    def estimate(work: ModelWork) -> None:
        linears = {n: m for n, m in work.model.named_modules() if hasattr(m, _MARK)}
        found = row_fisher(work, {n: m.weight for n, m in linears.items()}, windows)
        for name, module in linears.items():
            setattr(module, _MARK, found[name].sum(0 if is_conv1d(module) else 1))

    # A gradient a window: as long as so many steps of one.
    options = ((TrainingOptions(steps=windows, batch=1), 1.0),)
    return TrainModel(Sites(targets, _mark), estimate, _take, options, _gradient_bytes, once=True)


def output_weights(work: SiteWork, name: str) -> torch.Tensor:
    """The root of the information of each row of a weight [out], float64; never quite zero."""
    rows = work.learned[name].to(work.weight(name).device).double().sqrt()
    return rows.clamp_min(_FLOOR * rows.mean().clamp_min(1e-30))


def check_loss(method: str, anatomy: Anatomy, outline: Outline, instead: str) -> None:
    """Refuse a model that has no loss.

    Raises:
        CompressError: it has no head.
    """
    if not outline.predicts:
        raise CompressError(
            f"a model with a head, of whose loss {method} needs the gradients",
            f"a {anatomy.model_type} without the head of a language model or of labels",
            instead,
        )


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
