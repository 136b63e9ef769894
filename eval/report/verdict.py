"""The whole report in a sentence: what became of quality, of size, of speed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from compress.eval.report.cells import number
from compress.eval.report.label_rows import NAMES
from compress.eval.report.rows import quality_ratio
from compress.eval.report.runtime_rows import places
from compress.eval.report.schema import Report
from compress.eval.report.verdicts import (
    label_loss,
    likelihood_loss,
    masked_accuracy_loss,
    same_products,
    sample_losses,
    speed,
    task_loss,
)
from compress.eval.spec import EvaluationResult

Tone = Literal["good", "note", "warning"]
_TONES: dict[str, Tone] = {
    "better": "good", "within": "good", "uncertain": "note", "outside": "warning",
}  # fmt: skip
_WORSE = ("better", "within", "uncertain", "outside")
_NAMED = 3  # changes that a sentence tells; there may be dozens of tasks
_SAID = {
    "better": "Better than the original",
    "within": "Within tolerance",
    "uncertain": "Too coarsely measured to tell whether within tolerance",
    "outside": "Outside the tolerance",
}


class Verdict(NamedTuple):
    """A sentence, and whether it is good news."""

    tone: Tone
    text: str


def verdict(report: Report) -> Verdict | None:
    """Quality against the tolerance, then size and speed; None of a model that stands alone."""
    if report.before is None:
        return None
    costs = [*_size(report), *_speed(report)]
    quality = _quality(report.before, report.after)
    if quality is None:
        return Verdict("note", f"Quality was not measured: {', '.join(costs)}.")
    found, change = quality
    return Verdict(_TONES[found], f"{_SAID[found]}: {', '.join([change, *costs])}.")


def _quality(before: EvaluationResult, after: EvaluationResult) -> tuple[str, str] | None:
    """The worst verdict on a quality that findings judge, and the changes that earned it in words.

    Of qualities within the tolerance, or better, the first one stands for all.
    """
    judged = list(_judged(before, after))
    if not judged:
        return None
    worst = max((found for found, _ in judged), key=_WORSE.index)
    if worst in ("better", "within"):
        return worst, judged[0][1]
    changes = [change for found, change in judged if found == worst]
    more = len(changes) - _NAMED
    return worst, ", ".join(changes[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _judged(before: EvaluationResult, after: EvaluationResult) -> Iterator[tuple[str, str]]:
    """Every quality that both have: the verdict on it, and its change."""
    tolerance = after.spec.tolerance
    if paired := quality_ratio(before, after):
        factor, bounds = paired
        bound = after.generator and after.generator.likelihood
        name = "perplexity" if after.perplexity else "perplexity bound" if bound else (
            "masked perplexity"
        )  # fmt: skip
        yield likelihood_loss(factor, bounds, tolerance).verdict, f"{name} {_relative(factor)}"
    if before.masked and after.masked:
        same = before.tokens_sha256 == after.tokens_sha256
        loss = masked_accuracy_loss(before.masked, after.masked, same, tolerance)
        yield loss.verdict, f"masked accuracy {_points(-loss.value)}"
    if before.labels and after.labels:
        for name in after.labels.scores:
            if name in before.labels.scores:
                loss = label_loss(name, before.labels, after.labels, tolerance)
                yield loss.verdict, f"{_named(name)} {_points(-loss.value)}"
    for task, result in (after.tasks.tasks if after.tasks else {}).items():
        first = before.tasks and before.tasks.tasks.get(task)
        for name, metric in result.metrics.items():
            loss = task_loss(name, first, result, tolerance) if first else None
            if loss is not None:
                change = f"{number(first.metrics[name].value)} to {number(metric.value)}"
                yield loss.verdict, f"{task} {name} {change}"
    for name, old, new, loss in sample_losses(before, after):
        yield loss.verdict, f"{name} {number(old)} to {number(new)}"


def _named(score: str) -> str:
    """A score's name within a sentence."""
    name = NAMES[score]
    return name if name.isupper() else name[0].lower() + name[1:]


def _size(report: Report) -> list[str]:
    """How much smaller what is on the disk is than what was shipped."""
    new = report.after.cost.size.checkpoint_bytes
    old = report.run.source_bytes or report.before.cost.size.checkpoint_bytes
    if not new or not old:
        return []
    if 0.98 < new / old < 1.02:
        return ["no smaller"]
    return [f"{old / new:.3g}x smaller" if new < old else f"{new / old:.3g}x larger"]


def _speed(report: Report) -> list[str]:
    """What is told apart from the original in transformers, and runtimes that are faster."""
    timing = report.after.latency
    if timing is None:
        return []
    tolerance = report.after.spec.tolerance
    said = []
    for what, timed in (("", timing.prefill), ("decoding ", timing.decode)):
        told = "alike" if timed is None else speed(timed.interval, tolerance)
        if told == "faster" and not same_products(report.before, report.after):
            said.append(f"{what}{timed.speedup:.3g}x faster")
        elif told == "slower":
            said.append(f"{what}{1 / timed.speedup:.3g}x slower")
    # Of a model that generates, decoding is mostly what takes the time.
    for place in places(report.after)[1:]:
        what, timed = ("decoding ", place.decode) if place.decode else ("", place.prefill)
        if timed is not None and speed(timed.interval, tolerance) == "faster":
            said.append(f"{what}{timed.speedup:.3g}x faster in {place.name}")
    return said or ["no faster"]


def _relative(factor: float) -> str:
    """A ratio as a change in percent, or a multiple of what is beyond imagining as one."""
    if factor >= 10:
        return f"{number(factor)} times as high"
    return f"{100 * (factor - 1):+.2g} %"


def _points(change: float) -> str:
    return f"{100 * change:+.2g} points"


def short_source(source: str) -> str:
    """The last part of where a model came from: a folder's name, a hub id, a package."""
    name, _, _ = source.removeprefix("pypi:").partition("@sha256:")
    return name.rstrip("/").rpartition("/")[2] if name.startswith(("/", ".", "~")) else name
