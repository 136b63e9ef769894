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

from collections.abc import Iterator
from typing import Literal, NamedTuple

from compress.eval.quality.agreement import TOP5, change, change_of_hits, degenerate
from compress.eval.quality.generation import StepPoint
from compress.eval.quality.labels import LabelsResult
from compress.eval.quality.masked import MaskedResult
from compress.eval.quality.perplexity import PerplexityResult
from compress.eval.quality.stats import matched_difference, serial_mean, share_error
from compress.eval.quality.tasks import Metric, TaskResult
from compress.eval.quality.word_labels import word_change
from compress.eval.report.cells import Interval, half_width
from compress.eval.spec import EvaluationResult, ToleranceSpec

Verdict = Literal["better", "within", "uncertain", "outside"]
Speed = Literal["faster", "slower", "alike", "unmeasurable"]

FRECHET = "the Frechet distance of samples"

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
    degrees: tuple[int | None, int | None] = (None, None),
) -> Loss:
    """Of two figures with standard errors that are taken as independent.

    Where both models saw the same documents this overstates the noise: the safe side.

    Args:
        degrees: of freedom of either error, None for many; those of the difference are Welch's
            (1947, Biometrika 34:28).
    """
    loss = (before - after) if higher_is_better else (after - before)
    if None in errors:
        return Loss(loss, None, tolerance)
    variances = [error**2 for error in errors]
    shares = sum(v**2 / d for v, d in zip(variances, degrees, strict=True) if d)
    together = max(1, int(sum(variances) ** 2 / shares + 1e-9)) if shares else None
    half = half_width(sum(variances) ** 0.5, together)
    return Loss(loss, (loss - half, loss + half), tolerance)


def score_loss(
    before: Metric,
    after: Metric,
    tolerance: ToleranceSpec,
    samples: tuple[int, int] | None = None,
) -> Loss:
    """Of a task's score: points of accuracy where it is a share, else relative to the original.

    Args:
        samples: documents of either score. A share whose standard error is 0 (all answers right, or
            none) is no certain one: its error is that of so many documents, and unknown without.
    """
    share = is_share(before, after)
    allowed = tolerance.accuracy if share else tolerance.perplexity * abs(before.value)
    errors = (before.stderr, after.stderr)
    if share:
        counts = samples or (0, 0)
        errors = _error_of_share(before, counts[0]), _error_of_share(after, counts[1])
    return difference_loss(before.value, after.value, errors, after.higher_is_better, allowed)


def _error_of_share(metric: Metric, count: int) -> float | None:
    if metric.stderr == 0:
        return share_error(metric.value * count, count) if count else None
    return metric.stderr


def task_loss(
    name: str, before: TaskResult, after: TaskResult, tolerance: ToleranceSpec
) -> Loss | None:
    """Of one score of a task; None where the original does not have it."""
    if name not in before.metrics:
        return None
    counts = (before.samples, after.samples)
    return score_loss(before.metrics[name], after.metrics[name], tolerance, counts)


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
        errors = (before.accuracy_stderr or None, after.accuracy_stderr or None)
        return difference_loss(
            before.accuracy, after.accuracy, errors, True, tolerance.accuracy,
            (before.degrees, after.degrees),
        )  # fmt: skip
    counts = after.window_tokens
    pairs = zip(before.window_accuracy, after.window_accuracy, counts, strict=True)
    found = serial_mean([count * (a - b) for a, b, count in pairs], counts)
    interval = found.interval
    if interval is not None and degenerate(interval):
        # Windows that all differ by the same, as where both models answer alike, show no scatter:
        # the masked tokens say how seldom the two may differ.
        _, (low, high) = matched_difference(0, 0, sum(counts))
        interval = found.value + low, found.value + high
    return Loss(found.value, interval, tolerance.accuracy)


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


def sample_losses(
    before: EvaluationResult, after: EvaluationResult
) -> Iterator[tuple[str, float, float, Loss]]:
    """Of samples in the most steps that both models took: whether they are of the class that was
    asked for, and the distance of their features from those of real images.

    Yields:
        Name, before, after, loss.
    """
    pair = _last_points(before), _last_points(after)
    common = sorted(set(pair[0]) & set(pair[1]))
    if not common:
        return
    old, new = pair[0][common[-1]].images, pair[1][common[-1]].images
    if old is None or new is None:
        return
    tolerance = after.spec.tolerance
    if old.accuracy is not None and new.accuracy is not None:
        # A share without scatter (all samples, or none, of their class) is no certain one.
        errors = (old.accuracy_stderr or None, new.accuracy_stderr or None)
        loss = difference_loss(old.accuracy, new.accuracy, errors, True, tolerance.accuracy)
        yield "class accuracy of samples", old.accuracy, new.accuracy, loss
    errors = (old.frechet_stderr, new.frechet_stderr)
    allowed = tolerance.perplexity * old.frechet
    loss = difference_loss(old.frechet, new.frechet, errors, False, allowed)
    yield FRECHET, old.frechet, new.frechet, loss


def _last_points(result: EvaluationResult) -> dict[int, StepPoint]:
    samples = result.generator and result.generator.generation
    return {point.steps: point for point in samples.points} if samples else {}


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
