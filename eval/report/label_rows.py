"""Rows of models with a head of labels: how their answers agree with the labels."""

from __future__ import annotations

from compress.eval.quality.labels import LabelsResult
from compress.eval.report.cells import Row, number, span, times
from compress.eval.report.verdicts import TONES, label_loss
from compress.eval.spec import ToleranceSpec

NAMES = {
    "accuracy": "Accuracy", "top5": "Top-5 accuracy", "f1": "F1",
    "matthews": "Matthews correlation", "entity_f1": "Entity F1",
    "spearman": "Spearman correlation", "pearson": "Pearson correlation",
}  # fmt: skip


def label_rows(
    before: LabelsResult | None, after: LabelsResult, tolerance: ToleranceSpec
) -> list[Row]:
    """A row a score, then the loss."""
    rows = []
    for name, new in after.scores.items():
        old = before.scores.get(name) if before else None
        better = TONES[label_loss(name, before, after, tolerance).verdict] if old else 0
        rows.append(
            Row(
                NAMES[name],
                number(old.value) if old else "",
                number(new.value),
                times(new.value, old.value) if old and old.value > 0 and new.value > 0 else "",
                span(old.interval) if old else "",
                span(new.interval),
                better=better,
            )
        )
    whose = "an example" if after.lengths is None else "a word"
    loss = f"Cross entropy (nats {whose})" if after.names else "Squared error"
    old = before.loss if before else None
    return [*rows, Row(loss, number(old), number(after.loss), times(after.loss, old))]


def label_note(found: LabelsResult) -> str:
    """What the scores rest on, and whose intervals they have."""
    if found.lengths is not None:
        how = "of a bootstrap over texts"
    elif not found.names:
        how = "of a bootstrap over examples"
    elif found.task == "image":
        how = "Wilson's"
    else:
        how = "Wilson's for the accuracy, bootstrap over examples for the others"
    return (
        f"{found.examples:,} labelled examples; intervals (95 %) are {how}. Changes are judged by "
        "what both models answered to the same examples."
    )
