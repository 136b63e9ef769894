"""Quality of a model with a head of labels: its predictions on labelled examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from compress.errors import CompressError
from compress.eval.quality.agreement import scores
from compress.models.heads import head_of
from compress.models.inputs import LABELS, Rows

WHERE = "labels"


class Score(BaseModel):
    """One score; more of it is better."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    interval: tuple[float, float] = Field(description="95 % interval")


class LabelsResult(BaseModel):
    """What :func:`label_scores` measured; JSON-serialisable."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: Literal["sequence"] = Field(description="what has a label: each text or pair of texts")
    names: tuple[str, ...] = Field(
        description="of the labels by number; empty where a number is predicted"
    )
    examples: int
    loss: float = Field(description="mean cross entropy in nats, or squared error")
    scores: dict[str, Score] = Field(
        description="accuracy, f1 (of label 1 where there are two, else the mean over labels) and "
        "matthews; of a regression spearman and pearson"
    )
    labels: list[float] = Field(description="of the examples, in their order")
    predictions: list[float] = Field(description="so that two models can be compared by example")

    @property
    def main(self) -> str:
        """The score that stands for all."""
        return next(iter(self.scores))


def label_scores(
    model: nn.Module,
    rows: Rows,
    *,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> LabelsResult:
    """Let a model answer labelled examples and hold its answers against the labels.

    Args:
        model: with a head of labels; left as it was.
        rows: the examples, with labels that the head has (:mod:`compress.data.labelled`).
        batch_size: examples a forward, of like length; shorter ones are padded and masked.
        progress: called with (examples done, examples in all).

    Raises:
        CompressError: a model without such a head, rows without labels, or logits that are not
            finite.
    """
    head = head_of(model)
    if head is None or rows.labels is None or not len(rows):
        raise CompressError(
            "a model with a head of labels, and labelled examples",
            f"{type(model).__name__}" if head is None else "examples without labels", where=WHERE,
        )  # fmt: skip
    predictions, losses = torch.zeros(len(rows)), torch.zeros(len(rows))
    training, done = model.training, 0
    model.eval()
    try:
        for part in rows.lengths.argsort(stable=True).split(batch_size):
            batch = {name: tensor.to(model.device) for name, tensor in rows.get(part).items()}
            labels = batch.pop(LABELS)
            with torch.no_grad():
                logits = model(**batch).logits.float()
            if not bool(torch.isfinite(logits).all()):
                raise CompressError(
                    "finite logits", "NaN or infinity",
                    "The model is broken: check its weights for NaN and its dtype for overflow",
                    where=WHERE,
                )  # fmt: skip
            answers = logits[:, 0] if head.regression else logits.argmax(-1)
            predictions[part] = answers.float().cpu()
            losses[part] = head.losses(logits, labels).cpu()
            done += len(part)
            if progress:
                progress(done, len(rows))
    finally:
        model.train(training)
    right = rows.labels.tolist()
    found = scores(right, predictions.tolist(), len(head.names))
    return LabelsResult(
        task=head.task,
        names=head.names,
        examples=len(rows),
        loss=float(losses.double().mean()),
        scores={n: Score(value=value, interval=bounds) for n, (value, bounds) in found.items()},
        labels=right,
        predictions=predictions.tolist(),
    )
