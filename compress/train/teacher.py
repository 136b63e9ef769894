"""Who teaches a language model: another model, or what one has said before.

A teacher makes a *lesson* of each batch: hidden states to compare with, and for any stretch of
positions the divergence of the student's predictions from its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from compress.models.anatomy import Anatomy
from compress.models.halves import tail_logits, trunk_hidden
from compress.train.divergence import divergence, top_divergence

Batch = dict[str, torch.Tensor]
# Logits of the student [positions, vocabulary], which positions of the stretch they belong to (bool
# [batch, length]), the temperature -> the sum of divergences.
Apart = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]

# What a cached lesson adds to a batch; no input of any model.
TOKENS, SHARES = "teacher.tokens", "teacher.shares"


class Lesson(Protocol):
    """What a teacher has to say about one batch."""

    @property
    def layers(self) -> Mapping[int, torch.Tensor]:
        """Hidden states [batch, length, hidden size] by the student's block that should have them;
        empty where there are none."""

    def apart(self, positions: slice, inputs: Batch) -> Apart:
        """How to compare the predictions at some positions; ``inputs`` are cut to them."""


class Teacher(Protocol):
    """What makes lessons."""

    def observe(self, batch: Batch) -> Lesson:
        """The lesson of a batch; called without gradients."""


@dataclass(frozen=True)
class ModelTeacher:
    """A language model that teaches.

    Attributes:
        model, anatomy: any AutoModelForCausalLM or AutoModelForMaskedLM, on the batches' device.
        layers: the student's block -> the block of this model whose output it is compared with.
    """

    model: nn.Module
    anatomy: Anatomy
    layers: Mapping[int, int] = field(default_factory=dict)

    def observe(self, batch: Batch) -> StatesLesson:
        inputs = model_inputs(batch)
        last, found = trunk_hidden(self.model, self.anatomy, inputs, set(self.layers.values()))
        wanted = {mine: found[theirs] for mine, theirs in self.layers.items()}
        return StatesLesson(self.model, self.anatomy, last, wanted)


@dataclass(frozen=True)
class StatesLesson:
    """A model's hidden states; what it predicts is computed from ``last`` when it is asked for, a
    few positions at a time."""

    model: nn.Module
    anatomy: Anatomy
    last: torch.Tensor
    layers: dict[int, torch.Tensor]

    def apart(self, positions: slice, inputs: Batch) -> Apart:
        states = self.last[:, positions]

        def measure(logits: torch.Tensor, chosen: torch.Tensor, heat: float) -> torch.Tensor:
            with torch.no_grad():
                wanted = tail_logits(self.model, self.anatomy, inputs, states).float()
            return divergence(logits, wanted[chosen], heat)

        return measure


class CachedTeacher:
    """A teacher whose predictions come with the batches (:mod:`compress.train.teacher_cache`)."""

    def observe(self, batch: Batch) -> SharesLesson:
        return SharesLesson(batch[TOKENS], batch[SHARES])


@dataclass(frozen=True)
class SharesLesson:
    """The likeliest tokens [batch, length, k] and shares [batch, length, k + 1] of a teacher."""

    tokens: torch.Tensor
    shares: torch.Tensor
    layers: Mapping[int, torch.Tensor] = field(default_factory=dict)

    def apart(self, positions: slice, inputs: Batch) -> Apart:
        tokens, shares = self.tokens[:, positions], self.shares[:, positions]
        return lambda logits, chosen, heat: top_divergence(
            logits, tokens[chosen], shares[chosen], heat
        )


def model_inputs(batch: Batch) -> Batch:
    """What of a batch is given to a model."""
    return {k: v for k, v in batch.items() if k not in ("labels", TOKENS, SHARES)}
