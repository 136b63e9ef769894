"""What came of a classifier that was made smaller, and how curves of accuracy over size compare."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.eval.bench.masked_models import row
from compress.eval.bench.rows import Row, of_seeds
from compress.eval.bench.runs import step_cpu_seconds
from compress.eval.quality.stats import matched_difference, share_interval
from compress.eval.report import load_report

ACCURACY, REMOVED, LOST = "accuracy", "parameters removed", "accuracy lost"
TIME, SIZE = "processor time of the steps", "size / target"
BELOW = (1.0, 2.0, 4.0)  # points below the dense model, where removed shares are compared
_BAR_BELOW, _MORE = 2.0, 1.3


@dataclass(frozen=True)
class Outcome:
    """One run.

    Attributes:
        right: of each example, whether the smaller model answered it rightly.
        dense: the same of the model as it was.
        before, after: parameters, those of embeddings among them.
        seconds: of processor time, for all that made it smaller and won back what was lost. (On a
            busy machine the clock tells how busy it was.)
    """

    right: list[bool]
    dense: list[bool]
    before: int
    after: int
    seconds: float

    @classmethod
    def of_run(cls, out: Path) -> Outcome:
        """Of a run of a recipe."""
        report = load_report(out / "report.json")
        before, after = (
            [a == b for a, b in zip(x.labels.labels, x.labels.predictions, strict=True)]
            for x in (report.before, report.after)
        )
        counts = (x.cost.size.parameters for x in (report.before, report.after))
        return cls(after, before, *counts, step_cpu_seconds(out))

    @property
    def accuracy(self) -> float:
        """Percent."""
        return 100 * sum(self.right) / len(self.right)

    @property
    def removed(self) -> float:
        """Percent of the parameters."""
        return 100 * (1 - self.after / self.before)

    def size(self, share: float) -> float:
        """Parameters over those that were to be left."""
        return self.after / ((1 - share) * self.before)


def line(
    command: str, label: str, outcomes: Sequence[Outcome], share: float, **bars: float
) -> list[Row]:
    """What there is to say of a method at one size, the outcomes being those of its seeds.

    Args:
        share: of the parameters that was to go.
        bars: ``lost``: most points of accuracy that may be lost.
    """
    first = outcomes[0]
    low, high = share_interval(sum(first.right), len(first.right))
    pairs = list(zip(first.dense, first.right, strict=True))
    gained, lost = (
        sum(pair == which for pair in pairs) for which in ((False, True), (True, False))
    )
    least, most = matched_difference(gained, lost, len(pairs))[1]

    def found(figure: str, values: Iterable[float], **more: Any) -> Row:
        return row(command, f"{label}: {figure}", **of_seeds(list(values)), **more)

    return [
        found(ACCURACY, [o.accuracy for o in outcomes], unit="%", op=">="),
        found(f"{ACCURACY}, from", [100 * low], unit="%", op=">="),
        found(f"{ACCURACY}, to", [100 * high], unit="%", op=">="),
        found(LOST, [100 * (sum(o.dense) - sum(o.right)) / len(o.right) for o in outcomes],
              unit="points", bar=bars.get("lost")),
        found(f"{LOST}, from", [100 * least], unit="points"),
        found(f"{LOST}, to", [100 * most], unit="points"),
        found(REMOVED, [o.removed for o in outcomes], unit="%", op=">="),
        found(SIZE, [o.size(share) for o in outcomes]),
        found(TIME, [o.seconds / 60 for o in outcomes], unit="min"),
    ]  # fmt: skip


def share_at(points: Sequence[tuple[float, float]], accuracy: float) -> float:
    """The largest share of the parameters that can go with this accuracy left.

    Args:
        points: (percent removed, accuracy), the dense model's (0, accuracy) among them; between
            two of them the curve is a straight line, behind the last one there is nothing.
    """
    points = sorted(points)
    found = 0.0
    for (here, high), (there, low) in zip(points, points[1:], strict=False):
        if low >= accuracy:
            found = there
        elif high >= accuracy:
            found = here + (there - here) * (high - accuracy) / (high - low)
    return found


def equal_accuracy(
    command: str, label: str, dense: float, curves: Mapping[str, Sequence[tuple[float, float]]]
) -> list[Row]:
    """Parameters that `full` removes over those that the best of the others does.

    Args:
        dense: percent that the model as it was answers rightly.
        curves: method -> (percent removed, accuracy) at each size; without points where it was not
            measured.
    """
    known = {name: [(0.0, dense), *points] for name, points in curves.items() if points}
    if "full" not in known or len(known) < 2:
        return []
    rows = []
    for points in BELOW:
        removed = {name: share_at(curve, dense - points) for name, curve in known.items()}
        ours = removed.pop("full")
        best = max(removed.values())
        where = f"{label}, {points:g} points below dense: {REMOVED}"
        rows.append(row(command, f"{where} by full", ours, unit="%", op=">="))
        rows.append(row(command, f"{where} by the best other", best, unit="%", op=">="))
        if best:
            bar = _MORE if points == _BAR_BELOW else None
            rows.append(row(command, f"{where}, full / best other", ours / best, op=">=", bar=bar))
    return rows
