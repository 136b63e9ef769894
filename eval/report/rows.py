"""A report's numbers as rows: before, after, ratio. Pure; the writers only lay them out."""

from __future__ import annotations

import math

from compress.eval.cost.latency import PairedTimes
from compress.eval.cost.size import human_bytes
from compress.eval.quality.likelihood import LikelihoodResult
from compress.eval.quality.masked import MaskedResult
from compress.eval.quality.perplexity import PerplexityResult
from compress.eval.quality.stats import serial_mean
from compress.eval.quality.tasks import Metric
from compress.eval.report.cells import (
    Interval,
    Row,
    count,
    error_of,
    number,
    ratio,
    ratios,
    seconds,
    span,
    times,
)
from compress.eval.report.generator_rows import generator_rows
from compress.eval.report.label_rows import label_rows
from compress.eval.report.schema import Report
from compress.eval.report.verdicts import (
    TONES,
    Loss,
    likelihood_loss,
    masked_accuracy_loss,
    same_products,
    speed,
    task_loss,
    window_weights,
)
from compress.eval.spec import EvaluationResult


def quality_ratio(
    before: EvaluationResult, after: EvaluationResult
) -> tuple[float, Interval | None] | None:
    """Return exp of the mean difference of nats per token, and its interval, paired by window.

    Both models saw the same windows, so the differences are far less scattered than the windows:
    the interval of the ratio is narrower than those of the two perplexities suggest. None when the
    two results do not measure the same thing.
    """
    first, second = _likelihood(before), _likelihood(after)
    same_text = before.tokens_sha256 == after.tokens_sha256
    if first is None or second is None or type(first) is not type(second) or not same_text:
        return None
    if first.window != second.window or len(first.window_nll) != len(second.window_nll):
        return None
    weights = window_weights(second)
    if window_weights(first) != weights:
        return None
    pairs = zip(first.window_nll, second.window_nll, weights, strict=True)
    found = serial_mean([(b - a) * weight for a, b, weight in pairs], weights)
    bounds = found.interval
    return _exp(found.value), bounds and (_exp(bounds[0]), _exp(bounds[1]))


def _exp(nats: float) -> float:
    return math.exp(max(-700.0, min(nats, 700.0)))


def _likelihood(
    result: EvaluationResult,
) -> PerplexityResult | LikelihoodResult | MaskedResult | None:
    bound = result.generator and result.generator.likelihood
    return result.perplexity or bound or result.masked


def quality_rows(report: Report) -> list[Row]:
    """Rows of quality: perplexity, masked scores, labels or a generator's, then tasks."""
    before, after = report.before, report.after
    rows: list[Row] = []
    if after.perplexity:
        rows += _perplexity_rows(before, after)
    if after.masked:
        rows += _masked_rows(before, after)
    if after.labels:
        rows += label_rows(before and before.labels, after.labels, after.spec.tolerance)
    if after.generator:
        rows += generator_rows(before and before.generator, after.generator)
    if after.tasks:
        for task, result in after.tasks.tasks.items():
            first = before and before.tasks and before.tasks.tasks.get(task)
            for name, metric in result.metrics.items():
                old = first.metrics.get(name) if first else None
                loss = task_loss(name, first, result, after.spec.tolerance) if first else None
                rows.append(_score_row(f"{task} {name}", old, metric, loss))
    return rows


def _perplexity_rows(before: EvaluationResult | None, after: EvaluationResult) -> list[Row]:
    old = before.perplexity if before else None
    new = after.perplexity
    rows = [
        Row(
            "Perplexity",
            number(old.perplexity) if old else "",
            number(new.perplexity),
            error_before=span(old.interval) if old else "",
            error_after=span(new.interval),
            **_likelihood_ratio(before, after),
        )
    ]
    if new.bits_per_byte is not None:
        first = old.bits_per_byte if old else None
        rows.append(
            Row(
                "Bits per byte",
                number(first),
                number(new.bits_per_byte),
                times(new.bits_per_byte, first),
            )
        )
    return rows


def _likelihood_ratio(before: EvaluationResult | None, after: EvaluationResult) -> dict:
    paired = quality_ratio(before, after) if before else None
    if paired is None:
        return {}
    factor, bounds = paired
    better = TONES[likelihood_loss(factor, bounds, after.spec.tolerance).verdict]
    return {"ratio": ratio(factor), "error_ratio": ratios(bounds), "better": better}


def _masked_rows(before: EvaluationResult | None, after: EvaluationResult) -> list[Row]:
    old = before.masked if before else None
    new = after.masked
    same = before is not None and before.tokens_sha256 == after.tokens_sha256
    kept = masked_accuracy_loss(old, new, same, after.spec.tolerance) if old else None

    def row(name: str, value: str, error: str, **more) -> Row:
        return Row(
            name,
            number(getattr(old, value)) if old else "",
            number(getattr(new, value)),
            error_before=error_of(getattr(old, error), old.degrees) if old else "",
            error_after=error_of(getattr(new, error), new.degrees),
            **more,
        )

    pseudo = Row(
        "Pseudo-perplexity",
        number(old.pseudo_perplexity) if old else "",
        number(new.pseudo_perplexity),
        times(new.pseudo_perplexity, old.pseudo_perplexity if old else None),
        span(old.pseudo_perplexity_interval) if old else "",
        span(new.pseudo_perplexity_interval),
    )
    return [
        row(
            "Cross entropy (nats per masked token)",
            "cross_entropy",
            "cross_entropy_stderr",
            **{k: v for k, v in _likelihood_ratio(before, after).items() if k == "better"},
        ),
        row(
            "Masked accuracy",
            "accuracy",
            "accuracy_stderr",
            ratio=times(new.accuracy, old.accuracy if old else None),
            better=TONES[kept.verdict] if kept else 0,
        ),
        pseudo,
    ]


def _score_row(name: str, old: Metric | None, new: Metric, loss: Loss | None) -> Row:
    better = TONES[loss.verdict] if loss else 0
    return Row(
        name,
        number(old.value) if old else "",
        number(new.value),
        times(new.value, old.value if old else None),
        error_of(old.stderr) if old else "",
        error_of(new.stderr),
        better=better,
    )


def cost_rows(report: Report) -> list[Row]:
    """Rows of cost: size, work, memory, and latency where it was paired."""
    new = report.after.cost
    old = report.before.cost if report.before else None
    rows: list[Row] = []

    def add(name: str, first: float | None, second: float | None, form, gain: bool = True) -> None:
        if second is None:
            return
        better = 0 if not first else (second < 0.995 * first) - (second > 1.005 * first)
        better = better if gain else 0
        rows.append(
            Row(
                name,
                form(first) if first is not None else "",
                form(second),
                times(second, first),
                better=better,
            )
        )

    shipped = report.run.source_bytes
    for label, field, form, gain in (
        ("Parameters", "parameters", count, True),
        # Zeros are stored and multiplied like any other value.
        ("Non-zero parameters", "nonzero_parameters", count, False),
        ("Without embeddings", "parameters_without_embeddings", count, True),
        # Of a source that was unpacked to be compressed, the unpacked size is nobody's cost.
        ("Checkpoint", "checkpoint_bytes", human_bytes, shipped is None),
        ("Bits per weight (blocks)", "bits_per_weight", number, shipped is None),
    ):
        add(label, old and getattr(old.size, field), getattr(new.size, field), form, gain)
    if shipped is not None and old is not None:
        add("Checkpoint against its source", shipped, new.size.checkpoint_bytes, human_bytes)
    add(
        "MACs per token",
        old.macs.per_token if old and old.macs.context == new.macs.context else None,
        new.macs.per_token,
        count,
    )
    if new.memory:
        first = old.memory if old else None
        add("Peak memory, load", first and first.load, new.memory.load, human_bytes)
        add(
            f"Peak memory, {new.memory.tokens} tokens",
            first.prefill if first and first.tokens == new.memory.tokens else None,
            new.memory.prefill,
            human_bytes,
        )
    return rows + latency_rows(report)


def latency_rows(report: Report) -> list[Row]:
    """Rows of latency; the ratio is after / before, so below 1 is faster."""
    timing = report.after.latency
    if timing is None:
        return []
    rows = [_time_row(f"Prefill, {timing.prefill_tokens} tokens", timing.prefill, report)]
    if timing.decode:
        rows.append(_time_row("Decode, per token", timing.decode, report))
    return rows


def _time_row(name: str, timed: PairedTimes, report: Report) -> Row:
    low, high = timed.interval
    better = TONES[speed(timed.interval, report.after.spec.tolerance)]
    if better > 0 and report.before and same_products(report.before, report.after):
        better = 0
    return Row(
        name,
        seconds(timed.before),
        seconds(timed.after),
        ratio(1 / timed.speedup),
        error_ratio=ratios((1 / high, 1 / low)),
        better=better,
    )
