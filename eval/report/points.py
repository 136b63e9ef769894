"""Points and axes of the plots: quality of an evaluation against one of its costs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

from compress.eval.cost.size import human_bytes
from compress.eval.report.cells import count, half_width
from compress.eval.report.label_rows import NAMES
from compress.eval.report.plot import Point
from compress.eval.spec import EvaluationResult


class CostAxis(NamedTuple):
    """A cost that a plot can have on its horizontal axis.

    Attributes:
        measured: how it was measured: only results with the same can share an axis.
    """

    label: str
    short: str
    of: Callable[[EvaluationResult], float | None]
    format: Callable[[float], str]
    measured: Callable[[EvaluationResult], Hashable] = lambda _: None


class QualityAxis(NamedTuple):
    """A quality: its label, its value with an interval, and whether more of it is better."""

    label: str
    of: Callable[[EvaluationResult], tuple[float, float | None, float | None] | None]
    higher_is_better: bool


COSTS = (
    CostAxis("checkpoint on disk", "size", lambda r: r.cost.size.checkpoint_bytes, human_bytes),
    CostAxis(
        "MACs per token", "MACs", lambda r: r.cost.macs.per_token, count,
        lambda r: r.cost.macs.context,
    ),
    CostAxis("parameters", "parameters", lambda r: r.cost.size.parameters, count),
)  # fmt: skip


def quality_axis(results: Sequence[EvaluationResult]) -> QualityAxis | None:
    """Return the first quality that all have: perplexity, its bound, cross entropy,
    the main score of labels, a task."""
    if all(r.perplexity for r in results):
        return QualityAxis("perplexity (lower is better)", _perplexity, False)
    if all(r.generator and r.generator.likelihood for r in results):
        return QualityAxis("perplexity bound (lower is better)", _bound, False)
    if all(r.masked for r in results):
        return QualityAxis("masked cross entropy, nats (lower is better)", _entropy, False)
    main = {r.labels.main if r.labels else "" for r in results}
    if len(main) == 1 and "" not in main:
        return QualityAxis(f"{NAMES[main.pop()].lower()} (higher is better)", _label, True)
    common = [set(_task_metrics(r)) for r in results]
    for task, metric in sorted(set.intersection(*common)) if common else ():
        better = results[0].tasks.tasks[task].metrics[metric].higher_is_better
        side = "higher" if better else "lower"
        return QualityAxis(f"{task} {metric} ({side} is better)", _task(task, metric), better)
    return None


def cost_axes(results: Sequence[EvaluationResult], most: int = 2) -> list[CostAxis]:
    """Return the costs that all results have, measured in one way, and that differ by 1 % or more;
    at least one."""
    usable = [
        axis
        for axis in COSTS
        if all(axis.of(r) for r in results) and len({axis.measured(r) for r in results}) == 1
    ]
    moved = [a for a in usable if max(map(a.of, results)) > 1.01 * min(map(a.of, results))]
    return (moved or usable[:1])[:most]


def point(
    label: str, result: EvaluationResult, cost: CostAxis, quality: QualityAxis, style: str
) -> Point:
    """Place one result in a plot."""
    value, low, high = quality.of(result)
    return Point(label, cost.of(result), value, low, high, style)


def _perplexity(result: EvaluationResult) -> tuple[float, float | None, float | None]:
    low, high = result.perplexity.interval or (None, None)
    return result.perplexity.perplexity, low, high


def _bound(result: EvaluationResult) -> tuple[float, float | None, float | None]:
    found = result.generator.likelihood
    low, high = found.perplexity_interval or (None, None)
    return found.perplexity, low, high


def _entropy(result: EvaluationResult) -> tuple[float, float | None, float | None]:
    found = result.masked
    return _with_error(found.cross_entropy, found.cross_entropy_stderr, found.degrees)


def _label(result: EvaluationResult) -> tuple[float, float | None, float | None]:
    found = result.labels.scores[result.labels.main]
    return found.value, *found.interval


def _task(task: str, metric: str) -> Callable:
    def of(result: EvaluationResult) -> tuple[float, float | None, float | None]:
        found = result.tasks.tasks[task].metrics[metric]
        return _with_error(found.value, found.stderr)

    return of


def _with_error(
    value: float, error: float | None, degrees: int | None = None
) -> tuple[float, float | None, float | None]:
    if error is None:
        return value, None, None
    half = half_width(error, degrees)
    return value, value - half, value + half


def _task_metrics(result: EvaluationResult) -> list[tuple[str, str]]:
    tasks = result.tasks.tasks if result.tasks else {}
    return [(task, metric) for task, found in tasks.items() for metric in found.metrics]


def format_quality(value: float) -> str:
    """Tick labels: 60, 0.25."""
    return f"{value:,.6g}"
