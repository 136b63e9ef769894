"""Plain-language findings: a pure function over a report, so that each sentence can be tested."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from compress.eval.quality.generation import StepPoint
from compress.eval.report.cells import number
from compress.eval.report.rows import quality_ratio, quality_rows, times
from compress.eval.report.schema import Finding, Report
from compress.eval.spec import EvaluationResult

_PATTERN = re.compile(r"\d+:\d+")


def findings(report: Report) -> tuple[Finding, ...]:
    """Return what a careful reader would say about the result, warnings first."""
    found = [
        *_safety(report),
        *_quality(report),
        *_samples(report),
        *_latency(report),
        *_zeros(report),
        *_precision(report),
        *_disk(report),
    ]
    order = {"warning": 0, "good": 1, "note": 2}
    return tuple(sorted(found, key=lambda f: order[f.level]))


def _safety(report: Report) -> Iterator[Finding]:
    if report.run.trust_remote_code:
        yield Finding(
            level="warning",
            text="trust_remote_code was on: code that came with the model ran on this machine.",
        )


def _quality(report: Report) -> Iterator[Finding]:
    after = report.after
    bound = after.generator and after.generator.likelihood
    result = after.perplexity or bound or after.masked
    if result and len(result.window_nll) < 10:
        yield Finding(
            level="note",
            text=f"Quality rests on {len(result.window_nll)} windows; its interval is a rough one.",
        )
    paired = quality_ratio(report.before, after) if report.before else None
    if paired:
        name = "The perplexity bound" if bound else "Masked perplexity"
        yield _likelihood_finding("Perplexity" if after.perplexity else name, *paired)
    worse = [row.name for row in quality_rows(report) if row.better < 0 and " " in row.name]
    tasks = [name for name in worse if after.tasks and name.split()[0] in after.tasks.tasks]
    if tasks:
        yield Finding(
            level="warning", text=f"Beyond twice the standard error, worse at: {', '.join(tasks)}."
        )


def _likelihood_finding(name: str, ratio: float, bounds: tuple[float, float] | None) -> Finding:
    shown = times(ratio, 1) + (f" [{bounds[0]:.3g}, {bounds[1]:.3g}]" if bounds else "")
    if bounds and bounds[0] <= 1 <= bounds[1]:
        return Finding(
            level="good", text=f"{name} did not change measurably: {shown} the original."
        )
    if ratio > 2:
        return Finding(
            level="warning",
            text=f"{name} is {shown} the original: the model is damaged. Compress less, calibrate "
            "on text closer to the use, or train afterwards.",
        )
    level = "note" if ratio > 1.02 else "good"
    return Finding(level=level, text=f"{name} is {shown} the original.")


def _samples(report: Report) -> Iterator[Finding]:
    """Samples in the most steps that both models took: their classes and their distance."""
    pair = _last_points(report.before), _last_points(report.after)
    common = sorted(set(pair[0]) & set(pair[1]))
    if not common:
        return
    old, new = pair[0][common[-1]].images, pair[1][common[-1]].images
    if old is None or new is None:
        return
    for name, field, better in (
        ("Class accuracy of samples", "accuracy", 1),
        ("The Frechet distance of samples", "frechet", -1),
    ):
        first, second = getattr(old, field), getattr(new, field)
        if first is None or second is None:
            continue
        errors = getattr(old, f"{field}_stderr") or 0.0, getattr(new, f"{field}_stderr") or 0.0
        noise = 1.96 * math.hypot(*errors)
        shown = f"from {number(first)} to {number(second)} (noise ± {number(noise)})"
        if abs(second - first) <= noise:
            yield Finding(level="good", text=f"{name} did not change measurably: {shown}.")
        else:
            level = "good" if (second - first) * better > 0 else "warning"
            yield Finding(level=level, text=f"{name} went {shown}.")


def _last_points(result: EvaluationResult | None) -> dict[int, StepPoint]:
    samples = result and result.generator and result.generator.generation
    return {point.steps: point for point in samples.points} if samples else {}


def _latency(report: Report) -> Iterator[Finding]:
    timing = report.after.latency
    if timing is None:
        return
    predicted = None
    if report.before and report.before.cost.macs.context == report.after.cost.macs.context:
        predicted = report.before.cost.macs.per_token / report.after.cost.macs.per_token
    for name, timed in (("prefill", timing.prefill), ("decode", timing.decode)):
        if timed is None:
            continue
        low, high = timed.interval
        shown = f"{timed.speedup:.2f}x [{low:.2f}, {high:.2f}]"
        # Decode is bound by memory traffic, so its work predicts nothing.
        hint = ""
        if name == "prefill" and predicted and abs(predicted - 1) > 0.01:
            hint = f"; the multiply-accumulates predict {predicted:.2f}x"
        if low > 1:
            yield Finding(level="good", text=f"{name.capitalize()} is {shown} as fast{hint}.")
        elif high < 1:
            yield Finding(level="warning", text=f"{name.capitalize()} is slower: {shown}{hint}.")
        else:
            yield Finding(
                level="note", text=f"The run bought nothing in {name} latency: {shown}{hint}."
            )


def _zeros(report: Report) -> Iterator[Finding]:
    steps = [step for step in report.steps if "zeros" in step.writes]
    if not steps:
        return
    patterns = {
        value
        for step in steps
        for value in map(str, step.options.values())
        if _PATTERN.fullmatch(value)
    }
    if patterns:
        yield Finding(
            level="note",
            text=f"{' and '.join(sorted(patterns))} zeros bring no speed on a CPU or in vLLM "
            "today; only PyTorch's semi-structured kernels on recent NVIDIA GPUs use 2:4.",
        )
    else:
        yield Finding(
            level="note",
            text="Scattered zeros bring no speed on a CPU, on a GPU or in vLLM: every kernel "
            "multiplies by them.",
        )


def _precision(report: Report) -> Iterator[Finding]:
    bits = report.after.cost.size.bits_per_weight
    if not any("precision" in step.writes for step in report.steps):
        return
    stored = f" ({bits:.2f} bits per weight on disk)" if bits else ""
    yield Finding(
        level="note",
        text=f"Weights rounded to few bits{stored} are decompressed by stock transformers at load, "
        "so memory and latency do not change there; vLLM computes from the packed weights.",
    )


def _disk(report: Report) -> Iterator[Finding]:
    if report.before is None:
        return
    before = report.before.cost.size.checkpoint_bytes
    after = report.after.cost.size.checkpoint_bytes
    if not before or not after:
        return
    if after < 0.99 * before:
        yield Finding(level="good", text=f"The checkpoint is {times(before, after)} smaller.")
    elif any("zeros" in step.writes for step in report.steps):
        yield Finding(
            level="note",
            text="The checkpoint is no smaller: zeros are stored like any other value.",
        )
