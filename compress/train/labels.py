"""The loss of a model with a head of labels, alone or beside a teacher."""

from __future__ import annotations

import torch
from torch import nn

from compress.errors import CompressError
from compress.models.anatomy import Anatomy
from compress.models.halves import tail_logits, trunk_hidden
from compress.models.heads import head_of
from compress.models.inputs import LABELS, MASK
from compress.train.language import DistillationOptions, compared_layers, hidden_error
from compress.train.moment import Moment
from compress.train.teacher import ModelTeacher, model_inputs

Batch = dict[str, torch.Tensor]
# Logits of a model, and hidden states [batch, length, hidden size] by the student's block.
Answers = tuple[torch.Tensor, dict[int, torch.Tensor]]


class LabelLoss:
    """Mean loss of an answer: cross entropy in nats, or the squared error of a regression.

    Called like :class:`compress.train.language.LanguageLoss`; of a batch without any label it is 0.
    The distillation's ``labels`` weights that loss, its ``logits`` the divergence from the
    teacher's answers (:meth:`compress.models.heads.Head.divergences`), its ``hidden`` the hidden
    states of tokens that are no padding.

    Args:
        model, anatomy: with a head of labels.
        distillation: None to learn from the labels alone.
        teacher: who observes batches; by default the model itself, as it is at that time.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        distillation: DistillationOptions | None = None,
        teacher: ModelTeacher | None = None,
    ) -> None:
        self.model, self.anatomy, self.distillation = model, anatomy, distillation
        self.head = head_of(model)
        self.layers = compared_layers(distillation, len(anatomy.blocks))
        self.teacher = teacher or ModelTeacher(model, anatomy, {i: i for i in self.layers})

    def prepare(self, batch: Batch, _moment: Moment) -> Batch:
        """The batch as it is."""
        return batch

    def observe(self, batch: Batch) -> Answers:
        """What the teacher, as it is now, says of a batch; call it without gradients."""
        who = self.teacher
        logits, found = _answers(who.model, who.anatomy, batch, tuple(who.layers.values()))
        return logits, {mine: found[theirs] for mine, theirs in who.layers.items()}

    def __call__(
        self, batch: Batch, lesson: Answers | None = None
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss (a scalar) and its parts: ``cross_entropy`` or ``squared_error``, ``kl`` and
        ``hidden``.

        Raises:
            CompressError: a batch without labels that are to be learned, or hidden states that are
                not of one width.
        """
        logits, layers = _answers(self.model, self.anatomy, batch, self.layers)
        name = "squared_error" if self.head.regression else "cross_entropy"
        figures: dict[str, float] = {}
        loss = logits.new_zeros((), dtype=torch.float32)
        weights = self.distillation
        if lesson is None or weights.labels:
            error = _mean(self.head.losses(logits, self._labels(batch)))
            loss = error if lesson is None else weights.labels * error
            figures[name] = float(error.detach())
        if lesson is None:
            return loss, figures
        wanted, states = lesson
        kept = [self.head.answers(x, batch.get(MASK)) for x in (logits, wanted)]
        apart = self.head.divergences(*kept, weights.temperature).mean()
        figures["kl"] = float(apart.detach())
        if weights.logits:
            loss = loss + weights.logits * apart
        if self.layers:
            error = sum(hidden_error(layers[i], states[i], batch.get(MASK)) for i in self.layers)
            error = error / len(self.layers)
            loss = loss + weights.hidden * error
            figures["hidden"] = float(error.detach())
        return loss, figures

    def _labels(self, batch: Batch) -> torch.Tensor:
        if LABELS in batch:
            return batch[LABELS]
        raise CompressError(
            f"a label for each input of {type(self.model).__name__}, to learn from",
            f"batches of {', '.join(sorted(batch))}",
            "Calibrate a recipe on `examples`, give batches with `labels`, or learn from the "
            "uncompressed model alone (distillation.labels: 0)",
        )


def _answers(model: nn.Module, anatomy: Anatomy, batch: Batch, layers: tuple[int, ...]) -> Answers:
    """Logits of a batch, and what leaves some of the blocks."""
    inputs = model_inputs(batch)
    if not layers:
        return model(**inputs).logits, {}
    last, found = trunk_hidden(model, anatomy, inputs, layers)
    return tail_logits(model, anatomy, inputs, last), found


def _mean(losses: torch.Tensor) -> torch.Tensor:
    """The mean of the losses of answers; 0, with a graph, where there is none."""
    return losses.mean() if len(losses) else losses.sum()
