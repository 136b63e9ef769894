"""A report's numbers as rows: before, after, ratio. Pure; the writers only lay them out."""

from __future__ import annotations

import math

from compress.eval.cost.latency import PairedTimes
from compress.eval.cost.size import human_bytes
from compress.eval.quality.likelihood import LikelihoodResult
from compress.eval.quality.masked import MaskedResult
from compress.eval.quality.perplexity import PerplexityResult
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
from compress.eval.report.schema import Report
from compress.eval.spec import EvaluationResult
from compress.eval.stats import clustered_mean, interval


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
    differences = [b - a for a, b in zip(first.window_nll, second.window_nll, strict=True)]
    mean, error = clustered_mean(differences, [1.0] * len(differences))
    bounds = interval(mean, error, len(differences))
    return _exp(mean), bounds and (_exp(bounds[0]), _exp(bounds[1]))


def _exp(nats: float) -> float:
    return math.exp(max(-700.0, min(nats, 700.0)))


def _likelihood(
    result: EvaluationResult,
) -> PerplexityResult | LikelihoodResult | MaskedResult | None:
    bound = result.generator and result.generator.likelihood
    return result.perplexity or bound or result.masked


def quality_rows(report: Report) -> list[Row]:
    """Rows of quality: perplexity, masked scores or a generator's, then tasks."""
    before, after = report.before, report.after
    rows: list[Row] = []
    if after.perplexity:
        rows += _perplexity_rows(before, after)
    if after.masked:
        rows += _masked_rows(before, after)
    if after.generator:
        rows += generator_rows(before and before.generator, after.generator)
    if after.tasks:
        for task, result in after.tasks.tasks.items():
            first = before and before.tasks and before.tasks.tasks.get(task)
            for name, metric in result.metrics.items():
                old = first.metrics.get(name) if first else None
                rows.append(_score_row(f"{task} {name}", old, metric))
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
    better = 0 if bounds is None else (bounds[1] < 1) - (bounds[0] > 1)
    return {"ratio": ratio(factor), "error_ratio": ratios(bounds), "better": better}


def _masked_rows(before: EvaluationResult | None, after: EvaluationResult) -> list[Row]:
    old = before.masked if before else None
    new = after.masked

    def row(name: str, value: str, error: str, **more) -> Row:
        return Row(
            name,
            number(getattr(old, value)) if old else "",
            number(getattr(new, value)),
            error_before=error_of(getattr(old, error)) if old else "",
            error_after=error_of(getattr(new, error)),
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
        ),
        pseudo,
    ]


def _score_row(name: str, old, new) -> Row:  # noqa: ANN001  Metric or None
    better = 0
    if old and old.stderr is not None and new.stderr is not None:
        gap = (new.value - old.value) * (1 if new.higher_is_better else -1)
        # Both saw the same documents: independent errors overstate the noise, the safe side.
        noise = 1.96 * math.hypot(old.stderr, new.stderr)
        better = (gap > noise) - (gap < -noise)
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

    def add(name: str, first: float | None, second: float | None, form) -> None:
        if second is None:
            return
        better = 0 if not first else (second < 0.995 * first) - (second > 1.005 * first)
        rows.append(
            Row(
                name,
                form(first) if first is not None else "",
                form(second),
                times(second, first),
                better=better,
            )
        )

    for label, field, form in (
        ("Parameters", "parameters", count),
        ("Non-zero parameters", "nonzero_parameters", count),
        ("Without embeddings", "parameters_without_embeddings", count),
        ("Checkpoint", "checkpoint_bytes", human_bytes),
        ("Bits per weight (blocks)", "bits_per_weight", number),
    ):
        add(label, old and getattr(old.size, field), getattr(new.size, field), form)
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
    return rows + latency_rows(report.after)


def latency_rows(result: EvaluationResult) -> list[Row]:
    """Rows of latency; the ratio is after / before, so below 1 is faster."""
    timing = result.latency
    if timing is None:
        return []
    rows = [_time_row(f"Prefill, {timing.prefill_tokens} tokens", timing.prefill)]
    if timing.decode:
        rows.append(_time_row("Decode, per token", timing.decode))
    return rows


def _time_row(name: str, timed: PairedTimes) -> Row:
    low, high = timed.interval
    return Row(
        name,
        seconds(timed.before),
        seconds(timed.after),
        ratio(1 / timed.speedup),
        error_ratio=ratios((1 / high, 1 / low)),
        better=(low > 1) - (high < 1),
    )
