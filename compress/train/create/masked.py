"""Training a masked generator: all mask ratios, the weighting of the section, dropped classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from compress.data.codebook import Codebook
from compress.generators import (
    ClassCondition,
    MaskedGeneration,
    corrupt,
    legal_logits,
    mask_ratios,
    masked_loss,
)
from compress.generators.ratios import TRAINING_PRIORS, check_prior
from compress.generators.schedules import check_schedule
from compress.train import Moment
from compress.train.create.spec import SPECIAL, Objective, TrainSpec

_SCHEDULES = {"maskgit": "cosine", "mdlm": "linear", "llada": "linear"}


class MaskedObjective:
    """The loss of a masked generator, as compress.train.fit takes it.

    Each row of a batch is masked at a ratio of its own, from one draw spread over the batch. Of the
    rows of a class-conditional model some lose their class, so that the model can be guided (Ho and
    Salimans 2022, https://arxiv.org/abs/2207.12598, algorithm 1).

    Args:
        model: whose config holds the description.
    """

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        self.spec = MaskedGeneration.of(model)
        self.objective = objective
        self.prior = objective.ratios or TRAINING_PRIORS[objective.weighting]

    def __call__(
        self, model: nn.Module, batch: dict[str, torch.Tensor], moment: Moment
    ) -> tuple[torch.Tensor, dict[str, float]]:
        ids, generator = batch["input_ids"], moment.generator()
        ratios = mask_ratios(len(ids), self.prior, generator, length=ids.shape[1])
        noisy, labels = corrupt(ids, self.spec, ratios, generator)
        condition = self.spec.condition
        if isinstance(condition, ClassCondition) and self.objective.drop_condition:
            dropped = torch.rand(len(ids), generator=generator) < self.objective.drop_condition
            noisy[dropped.to(ids.device), condition.position] = self.spec.class_id(None)
        logits = legal_logits(model, noisy, self.spec, batch.get("attention_mask"))
        loss = masked_loss(
            logits,
            labels,
            ratios,
            self.objective.weighting,
            self.objective.label_smoothing,
            lengths=(~self.spec.fixed(ids)).sum(dim=1),
        )
        return loss, {}


def describe(config: Any, spec: TrainSpec, reader: Any) -> None:
    """Write into the config how samples are drawn from the model that is trained.

    Args:
        config: of a model from scratch, or of the one that is adapted.
        reader: its tokenizer or codebook; None for a model that is only planned.

    Raises:
        CompressError: no such prior or schedule, or a tokenizer without a mask token.
    """
    weighting = spec.objective.weighting
    check_prior(spec.objective.ratios or TRAINING_PRIORS[weighting])
    schedule = spec.objective.schedule or _SCHEDULES[weighting]
    common = {
        "weighting": weighting,
        "schedule": check_schedule(schedule, even=True),
        "shift": spec.objective.shift,
    }
    if spec.from_ is not None:
        if any(name.endswith("ForCausalLM") for name in config.architectures or []):
            config.is_causal = False  # the route of Dream: a causal model learns to look ahead
        derived = MaskedGeneration.of(config, reader)
        derived = derived if spec.special_tokens else derived.without_frame()
        MaskedGeneration(**{**derived.model_dump(), **common}).store(config)
    elif spec.images is not None:
        MaskedGeneration(**_of_images(spec, reader), **common).store(config)
    else:
        size = spec.vocabulary
        MaskedGeneration(mask_id=size - 1, vocabulary=size - len(SPECIAL), **common).store(config)


def _of_images(spec: TrainSpec, codebook: Codebook | None) -> dict[str, Any]:
    slots, classes = spec.images.codes, spec.images.classes
    condition = ClassCondition(offset=slots, classes=classes, null=slots + classes)
    fields = {"mask_id": slots + classes + 1, "vocabulary": slots, "condition": condition}
    if codebook is not None:
        fields |= {
            "vocabulary": codebook.codes, "length": codebook.tokens, "grid": codebook.grid
        }  # fmt: skip
    return fields
