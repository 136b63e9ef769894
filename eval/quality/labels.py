"""Quality of a model with a head of labels: its predictions on labelled examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from compress.errors import CompressError
from compress.eval.quality.agreement import TOP, image_scores, scores
from compress.eval.quality.word_labels import word_scores
from compress.models.heads import head_of
from compress.models.inputs import IGNORED, LABELS, ImageRows, Rows

WHERE = "labels"


class Score(BaseModel):
    """One score; more of it is better."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    interval: tuple[float, float] = Field(description="95 % interval")


class LabelsResult(BaseModel):
    """What :func:`label_scores` measured; JSON-serialisable."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: Literal["sequence", "token", "image"] = Field(
        description="what has a label: each text or pair of texts, each word, or each image"
    )
    names: tuple[str, ...] = Field(
        description="of the labels by number; empty where a number is predicted"
    )
    examples: int = Field(description="texts, or images")
    loss: float = Field(description="mean cross entropy in nats, or squared error")
    scores: dict[str, Score] = Field(
        description="accuracy, f1 (of label 1 where there are two, else the mean over labels) and "
        "matthews; of a regression spearman and pearson; of words entity_f1 and accuracy, or "
        "accuracy and f1 where labels tag no entities; of images accuracy and, of more than five "
        "labels, top5"
    )
    lengths: list[int] | None = Field(
        default=None, description="labelled words of each example, where words have labels"
    )
    labels: list[float] = Field(description="of the examples or their words, in their order")
    predictions: list[float] = Field(description="so that two models can be compared by example")
    among_five: list[bool] | None = Field(
        default=None,
        description="of images: whether an example's label is among the five likeliest ones",
    )

    @property
    def main(self) -> str:
        """The score that stands for all."""
        return next(iter(self.scores))


def label_scores(
    model: nn.Module,
    rows: Rows | ImageRows,
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
    by_word = LABELS in rows.flat
    if head is None or not len(rows) or (rows.labels is None and not by_word):
        raise CompressError(
            "a model with a head of labels, and labelled examples",
            f"{type(model).__name__}" if head is None else "examples without labels", where=WHERE,
        )  # fmt: skip
    # Of each example: labels, answers, losses, one each or one a labelled word.
    found: list[tuple[torch.Tensor, ...]] = [()] * len(rows)
    top = head.task == "image" and len(head.names) > TOP
    among = torch.zeros(len(rows) if top else 0, dtype=torch.bool)
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
            answers = logits[..., 0] if head.regression else logits.argmax(-1)
            if top:
                likeliest = logits.topk(TOP, dim=-1).indices
                among[part] = (likeliest == labels[:, None]).any(-1).cpu()
            for row, number in enumerate(part.tolist()):
                known = labels[row] != IGNORED if by_word else ...
                found[number] = (
                    labels[row][known].float().flatten().cpu(),
                    answers[row][known].float().flatten().cpu(),
                    head.losses(logits[row], labels[row]).cpu(),
                )
            done += len(part)
            if progress:
                progress(done, len(rows))
    finally:
        model.train(training)
    right, said, losses = (torch.cat(parts) for parts in zip(*found, strict=True))
    lengths = [len(labels) for labels, _, _ in found] if by_word else None
    right, said = right.tolist(), said.tolist()
    if by_word:
        agreed = word_scores(lengths, right, said, head.names)
    elif head.task == "image" and not head.regression:
        agreed = image_scores(right, said, among.tolist() if top else None)
    else:
        agreed = scores(right, said, len(head.names))
    return LabelsResult(
        task=head.task,
        names=head.names,
        examples=len(rows),
        loss=float(losses.double().mean()),
        scores={n: Score(value=value, interval=bounds) for n, (value, bounds) in agreed.items()},
        lengths=lengths,
        labels=right,
        predictions=said,
        among_five=among.tolist() if top else None,
    )
