"""Whether a change matters: an interval held against a stated tolerance, never a bare difference.

A loss is positive where the compressed model is worse. Its verdict is

    better      the whole interval is below zero
    within      the whole interval is below the tolerance
    outside     the whole interval is above the tolerance
    uncertain   anything else, also where there is no interval

so that neither a small change measured too coarsely nor a large one that happens to overlap zero is
called harmless.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from compress.eval.quality.agreement import TOP5, change, change_of_hits
from compress.eval.quality.labels import LabelsResult
from compress.eval.quality.masked import MaskedResult
from compress.eval.quality.perplexity import PerplexityResult
from compress.eval.quality.stats import serial_mean
from compress.eval.quality.tasks import Metric
from compress.eval.quality.word_labels import word_change
from compress.eval.report.cells import Interval
from compress.eval.spec import EvaluationResult, ToleranceSpec

Verdict = Literal["better", "within", "uncertain", "outside"]
Speed = Literal["faster", "slower", "alike", "unmeasurable"]

TONES: dict[str, int] = {
    "better": 1, "within": 1, "uncertain": 0, "outside": -1,
    "faster": 1, "slower": -1, "alike": 0, "unmeasurable": 0,
}  # fmt: skip


class Loss(NamedTuple):
    """How much worse, with its 95 % interval, and how much would be tolerated (same unit)."""

    value: float
    interval: Interval | None
    tolerance: float

    @property
    def verdict(self) -> Verdict:
        if self.interval is None:
            return "uncertain"
        low, high = self.interval
        if low > self.tolerance:
            return "outside"
        if high < 0:
            return "better"
        return "within" if high <= self.tolerance else "uncertain"


def difference_loss(
    before: float,
    after: float,
    errors: tuple[float | None, float | None],
    higher_is_better: bool,
    tolerance: float,
) -> Loss:
    """Of two figures with standard errors that are taken as independent.

    Where both models saw the same documents this overstates the noise: the safe side.
    """
    loss = (before - after) if higher_is_better else (after - before)
    if None in errors:
        return Loss(loss, None, tolerance)
    half = 1.96 * (errors[0] ** 2 + errors[1] ** 2) ** 0.5
    return Loss(loss, (loss - half, loss + half), tolerance)


def score_loss(before: Metric, after: Metric, tolerance: ToleranceSpec) -> Loss:
    """Of a task's score: points of accuracy where it is a share, else relative to the original."""
    share = is_share(before, after)
    allowed = tolerance.accuracy if share else tolerance.perplexity * abs(before.value)
    errors = (before.stderr, after.stderr)
    return difference_loss(before.value, after.value, errors, after.higher_is_better, allowed)


def is_share(before: Metric, after: Metric) -> bool:
    """Whether both scores are shares of right answers, and not losses or counts."""
    return after.higher_is_better and all(0 <= m.value <= 1 for m in (before, after))


def masked_accuracy_loss(
    before: MaskedResult, after: MaskedResult, same_text: bool, tolerance: ToleranceSpec
) -> Loss:
    """Of masked accuracy, paired by window where both models saw the same masked tokens."""
    paired = (
        same_text and before.seed == after.seed and before.mask_fraction == after.mask_fraction
        and before.window_accuracy and after.window_accuracy
        and before.window_tokens == after.window_tokens
    )  # fmt: skip
    if not paired:
        errors = (before.accuracy_stderr, after.accuracy_stderr)
        return difference_loss(before.accuracy, after.accuracy, errors, True, tolerance.accuracy)
    counts = after.window_tokens
    pairs = zip(before.window_accuracy, after.window_accuracy, counts, strict=True)
    found = serial_mean([count * (a - b) for a, b, count in pairs], counts)
    return Loss(found.value, found.interval, tolerance.accuracy)


def label_loss(
    name: str, before: LabelsResult, after: LabelsResult, tolerance: ToleranceSpec
) -> Loss:
    """Of a score of labels, paired by example where both models answered the same ones.

    Of other examples no interval is told: those of the two scores are not symmetric.
    """
    if before.labels != after.labels or name not in before.scores:
        old = before.scores.get(name)
        lost = old.value - after.scores[name].value if old else 0.0
        return Loss(lost, None, tolerance.accuracy)
    said = before.predictions, after.predictions
    if name == TOP5:
        value, (low, high) = change_of_hits(before.among_five or (), after.among_five or ())
    elif after.lengths is not None:
        value, (low, high) = word_change(name, after.lengths, after.labels, *said, after.names)
    else:
        value, (low, high) = change(name, after.labels, *said, len(after.names))
    return Loss(-value, (-high, -low), tolerance.accuracy)


def likelihood_loss(factor: float, bounds: Interval | None, tolerance: ToleranceSpec) -> Loss:
    """Of a ratio of perplexities, after / before."""
    interval = bounds and (bounds[0] - 1, bounds[1] - 1)
    return Loss(factor - 1, interval, tolerance.perplexity)


def speed(interval: Interval, tolerance: ToleranceSpec) -> Speed:
    """Of a speed-up (before / after) by the interval of its pairs.

    "unmeasurable": the interval includes 1. "alike": it does not, but not all of it is further
    from 1 than what is tolerated.
    """
    low, high = interval
    if low <= 1 <= high:
        return "unmeasurable"
    if low > 1 + tolerance.speed:
        return "faster"
    return "slower" if high < 1 - tolerance.speed else "alike"


def same_products(before: EvaluationResult, after: EvaluationResult) -> bool:
    """Whether both models do the same arithmetic: no difference in speed can be the model's gain.

    Zeros, rounded values and packed storage leave a dense product what it is; products of packed
    weights or of 2:4 ones are others.
    """
    old, new = before.cost, after.cost
    dense = all(dense_products(cost.execution) for cost in (old, new))
    return dense and (before.dtype, old.macs) == (after.dtype, new.macs)


def dense_products(execution: str) -> bool:
    """Whether what a report says of how a model ran is, as of any model before it was compressed,
    that it ran dense products; older reports say nothing where it did."""
    return not execution or execution.startswith("dense products")


def window_weights(result: object) -> list[float]:
    """Tokens of each window of a likelihood; older results tell it by window and stride."""
    known = getattr(result, "window_tokens", None)
    if known is not None:
        return known
    count = len(result.window_nll)
    if isinstance(result, PerplexityResult):
        later = min(result.stride, result.window - 1)
        return [float(result.window - 1), *[float(later)] * (count - 1)]
    return [1.0] * count
