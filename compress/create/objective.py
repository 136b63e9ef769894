"""What a model is trained for: the next token, or masked tokens at all mask ratios."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from compress.create.spec import TrainSpec
from compress.train import LossFunction, Moment

Batch = dict[str, torch.Tensor]


def loss_for(model: nn.Module, spec: TrainSpec) -> LossFunction:
    """The loss of the section's objective, as compress.train.fit takes it."""
    if spec.objective.kind == "causal":
        return next_token
    from compress.create.masked import MaskedObjective

    return MaskedObjective(model, spec.objective)


def describe_generation(config: Any, spec: TrainSpec, reader: Any) -> None:
    """Write into the config how samples are drawn from a masked model; nothing for a causal one."""
    if spec.objective.kind == "masked":
        from compress.create.masked import describe

        describe(config, spec, reader)


def next_token(model: nn.Module, batch: Batch, _moment: Moment) -> tuple[torch.Tensor, dict]:
    """Mean cross entropy (nats) of the next token; padding is neither read nor predicted."""
    labels = batch["input_ids"][:, 1:]
    if "attention_mask" in batch:
        labels = labels.masked_fill(batch["attention_mask"][:, 1:] == 0, -100)
    logits = model(**batch).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1).float(), labels.flatten()), {}
