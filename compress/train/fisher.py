"""Fisher information of weights: mean squares of the loss's gradients. Nothing learns from them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from compress.errors import CompressError
from compress.generators.description import is_masked_generator
from compress.train.moment import Moment
from compress.train.whole import ModelWork, model_loss, training_source


def row_fisher(
    work: ModelWork, weights: Mapping[str, nn.Parameter], windows: int
) -> dict[str, torch.Tensor]:
    """Mean squared gradient of each weight, from one window (of a head of labels, one input) at a
    time.

    Args:
        weights: whose information is asked for, by name.
        windows: of the calibration, the first ones, at most.

    Returns:
        name -> a tensor of the weight's shape, float32, on the model's device.

    Raises:
        CompressError: a masked generator, whose loss is another at every draw of a mask.
    """
    if is_masked_generator(work.model.config):
        raise CompressError(
            "a language model, whose loss is a function of its text", "a masked generator",
            "Use svd_llm, which needs no gradients",
        )  # fmt: skip
    measured = model_loss(work.model, work.anatomy)
    source = training_source(work)
    count = min(windows, len(source))
    squares = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    parameters = list(weights.values())
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        for number in range(count):
            work.guard()
            batch = {k: v.to(work.device) for k, v in source.get(torch.tensor([number])).items()}
            batch = measured.prepare(batch, Moment(number, count, work.seed))
            loss, _ = measured(batch, None)
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            for name, gradient in zip(squares, found, strict=True):
                if gradient is not None:
                    squares[name].addcmul_(gradient, gradient, value=1 / count)
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
    return squares
