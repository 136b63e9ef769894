"""What a model is trained for: the next token, masked tokens at all mask ratios, or labels."""

from __future__ import annotations

from typing import Any

from torch import nn

from compress.models.anatomy import anatomy_of
from compress.train import LossFunction
from compress.train.create.spec import TrainSpec
from compress.train.labels import LabelLoss
from compress.train.language import LanguageLoss


def loss_for(model: nn.Module, spec: TrainSpec) -> LossFunction:
    """The loss of the section's objective, as compress.train.fit takes it."""
    if spec.objective.kind != "masked":
        kind = LabelLoss if spec.objective.kind == "labels" else LanguageLoss
        plain = kind(model, anatomy_of(model))
        return lambda _model, batch, _moment: plain(batch)
    from compress.train.create.masked import MaskedObjective

    return MaskedObjective(model, spec.objective)


def describe_generation(config: Any, spec: TrainSpec, reader: Any) -> None:
    """Write into the config how samples are drawn from a masked model; nothing for a causal one."""
    if spec.objective.kind == "masked":
        from compress.train.create.masked import describe

        describe(config, spec, reader)
