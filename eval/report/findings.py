"""Plain-language findings: a pure function over a report, so that each sentence can be tested."""

from __future__ import annotations

import re
from collections.abc import Iterator

from compress.eval.cost.size import human_bytes
from compress.eval.report.cells import number
from compress.eval.report.figures import figure_of
from compress.eval.report.label_rows import NAMES
from compress.eval.report.rows import quality_ratio, times
from compress.eval.report.runtime_rows import runtime_findings
from compress.eval.report.schema import Finding, Report
from compress.eval.report.verdicts import (
    FRECHET,
    Loss,
    dense_products,
    is_share,
    label_loss,
    likelihood_loss,
    masked_accuracy_loss,
    same_products,
    sample_losses,
    speed,
    task_loss,
)
from compress.eval.spec import EvaluationResult, ToleranceSpec

_LEVELS = {"better": "good", "within": "good", "uncertain": "note", "outside": "warning"}
_JUDGED = {
    "better": "better than the original, beyond the error.",
    "within": "within the tolerance of {}.",
    "uncertain": "measured too coarsely to say whether that is within the tolerance of {}.",
    "outside": "outside the tolerance of {}.",
}
_PATTERN = re.compile(r"\d+:\d+")


def findings(report: Report) -> tuple[Finding, ...]:
    """Return what a careful reader would say about the result, warnings first."""
    found = [
        *_safety(report),
        *_cached(report),
        *_expected(report),
        *_quality(report),
        *_samples(report),
        *_latency(report),
        *_zeros(report),
        *_precision(report),
        *_disk(report),
        *runtime_findings(report),
    ]
    order = {"warning": 0, "good": 1, "note": 2}
    return tuple(sorted(found, key=lambda f: order[f.level]))


def _safety(report: Report) -> Iterator[Finding]:
    for note in report.run.source_notes:
        yield Finding(level="note", text=f"{note[:1].upper()}{note[1:]}.")
    for note in report.run.notes:
        yield Finding(level="note", text=f"On the way: {note}.")
    if report.run.trust_remote_code:
        yield Finding(
            level="warning",
            text="trust_remote_code was on: code that came with the model ran on this machine.",
        )
    for name, digest in report.run.imports.items():
        yield Finding(
            level="note",
            text=f"Code that the recipe names ran on this machine: {name} (sha256 {digest[:12]}).",
        )


def _cached(report: Report) -> Iterator[Finding]:
    """Which figures this run has not measured itself, and when they were."""
    for whose, result in (("original", report.before), ("model", report.after)):
        for part, measured in result.cached.items() if result else ():
            yield Finding(
                level="note",
                text=f"From the cache: {part} of the {whose}, measured at {measured} with the same "
                "weights, tokens, options and code.",
            )


def _expected(report: Report) -> Iterator[Finding]:
    """Whether the run has reproduced what its recipe says it gave."""
    for name, stated in ((report.run.recipe or {}).get("expected") or {}).items():
        if not isinstance(stated, dict) or stated.keys() != {"value", "within"}:
            continue  # of a report from before figures were checked
        value, within = stated["value"], stated["within"]
        text = f"Expected {name} {number(value)} within {number(within)}: "
        found = figure_of(report, name)
        if found is None:
            yield Finding(level="warning", text=f"{text}not measured.")
        elif abs(found - value) <= within:
            yield Finding(level="good", text=f"{text}reproduced ({number(found)}).")
        else:
            yield Finding(level="warning", text=f"{text}NOT reproduced: {number(found)}.")


def _quality(report: Report) -> Iterator[Finding]:
    before, after = report.before, report.after
    bound = after.generator and after.generator.likelihood
    result = after.perplexity or bound or after.masked
    if result and len(result.window_nll) < 10:
        yield Finding(
            level="note",
            text=f"Quality rests on {len(result.window_nll)} windows; its interval is a rough one.",
        )
    if before is None:
        return
    tolerance = after.spec.tolerance
    if paired := quality_ratio(before, after):
        name = "The perplexity bound" if bound else "Masked perplexity"
        yield _likelihood_finding("Perplexity" if after.perplexity else name, *paired, tolerance)
    if before.masked and after.masked:
        same = before.tokens_sha256 == after.tokens_sha256
        loss = masked_accuracy_loss(before.masked, after.masked, same, tolerance)
        yield _score_finding(
            "Masked accuracy", before.masked.accuracy, after.masked.accuracy, loss,
            _points(tolerance),
        )  # fmt: skip
    yield from _labels(before, after)
    yield from _tasks(before, after)


def _labels(before: EvaluationResult, after: EvaluationResult) -> Iterator[Finding]:
    if before.labels is None or after.labels is None:
        return
    tolerance = after.spec.tolerance
    for name, new in after.labels.scores.items():
        if name in before.labels.scores:
            loss = label_loss(name, before.labels, after.labels, tolerance)
            yield _score_finding(
                NAMES[name], before.labels.scores[name].value, new.value, loss, _points(tolerance)
            )


def _likelihood_finding(
    name: str, ratio: float, bounds: tuple[float, float] | None, tolerance: ToleranceSpec
) -> Finding:
    verdict = likelihood_loss(ratio, bounds, tolerance).verdict
    shown = times(ratio, 1) + (f" [{bounds[0]:.3g}, {bounds[1]:.3g}]" if bounds else "")
    text = f"{name} is {shown} the original: {_JUDGED[verdict].format(_percent(tolerance))}"
    if verdict == "outside" and ratio > 2:
        text += (
            " The model is damaged: compress less, calibrate on text closer to the use, or train "
            "afterwards."
        )
    return Finding(level=_LEVELS[verdict], text=text)


def _score_finding(name: str, old: float, new: float, loss: Loss, tolerance: str) -> Finding:
    text = f"{name} went from {number(old)} to {number(new)}{_noise(loss)}: "
    return Finding(level=_LEVELS[loss.verdict], text=text + _JUDGED[loss.verdict].format(tolerance))


def _noise(loss: Loss) -> str:
    """The interval of a change: half its width, or where it lies if not around the change."""
    if loss.interval is None:
        return ""
    low, high = loss.interval
    if abs(low + high - 2 * loss.value) < 0.02 * (high - low):
        return f" (± {number(high - loss.value)})"
    return f" (change {number(-high)} to {number(-low)})"


def _tasks(before: EvaluationResult, after: EvaluationResult) -> Iterator[Finding]:
    """One sentence a verdict, for there may be dozens of tasks."""
    if before.tasks is None or after.tasks is None:
        return
    spec = after.spec.tolerance
    found: dict[str, list[str]] = {}
    stated: dict[str, set[str]] = {}
    for task, result in after.tasks.tasks.items():
        first = before.tasks.tasks.get(task)
        for name, metric in result.metrics.items():
            loss = task_loss(name, first, result, spec) if first else None
            if loss is not None:
                share = is_share(first.metrics[name], metric)
                allowed = _points(spec) if share else f"{_percent(spec)} of losses"
                found.setdefault(loss.verdict, []).append(f"{task} {name}")
                stated.setdefault(loss.verdict, set()).add(allowed)
    for verdict, names in found.items():
        judged = _JUDGED[verdict].format(", ".join(sorted(stated[verdict])))
        yield Finding(level=_LEVELS[verdict], text=f"{', '.join(names)}: {judged}")


def _percent(tolerance: ToleranceSpec) -> str:
    return f"{100 * tolerance.perplexity:.3g} %"


def _points(tolerance: ToleranceSpec) -> str:
    points = f"{100 * tolerance.accuracy:.3g}"
    return f"{points} point{'' if points == '1' else 's'} of accuracy"


def _samples(report: Report) -> Iterator[Finding]:
    """Samples in the most steps that both models took: their classes and their distance."""
    if report.before is None:
        return
    tolerance = report.after.spec.tolerance
    for name, old, new, loss in sample_losses(report.before, report.after):
        allowed = _percent(tolerance) if name == FRECHET else _points(tolerance)
        yield _score_finding(f"{name[0].upper()}{name[1:]}", old, new, loss, allowed)


def _latency(report: Report) -> Iterator[Finding]:
    timing = report.after.latency
    if timing is None:
        return
    predicted = _predicted(report)
    same = report.before is not None and same_products(report.before, report.after)
    for name, timed in (("prefill", timing.prefill), ("decode", timing.decode)):
        if timed is None:
            continue
        low, high = timed.interval
        shown = f"{timed.speedup:.2f}x [{low:.2f}, {high:.2f}]"
        # Decode is bound by memory traffic, so its work predicts nothing.
        hint = ""
        if name == "prefill" and predicted and abs(predicted - 1) > 0.01:
            hint = f"; the multiply-accumulates predict {predicted:.2f}x"
        found = speed(timed.interval, report.after.spec.tolerance)
        if found == "unmeasurable":
            text = f"No measurable change of {name} latency: {shown}{hint}."
        elif found == "alike":
            allowed = f"{100 * report.after.spec.tolerance.speed:.3g} %"
            text = f"{name.capitalize()} speed is {shown}, not clearly more than {allowed} from 1"
            text += f"{hint}."
        elif found == "faster" and same:
            text = f"{name.capitalize()} was {shown} as fast, yet both models do the same products:"
            text += " nothing in the model explains it."
        elif found == "faster":
            yield Finding(level="good", text=f"{name.capitalize()} is {shown} as fast{hint}.")
            continue
        else:
            text = f"{name.capitalize()} is slower: {shown}{hint}."
        yield Finding(level="warning" if found == "slower" else "note", text=text)
    asked = report.after.spec.latency_spec()
    if report.after.kind == "causal" and timing.decode is None and asked and asked.decode_tokens:
        yield Finding(
            level="note",
            text=f"Decoding was not timed: a {report.after.model_class} has no key-value cache to "
            "go on from.",
        )


def _predicted(report: Report) -> float | None:
    """The speed-up of exactly the timed forward, if time went with the multiply-accumulates."""
    timing = report.after.latency
    if report.before is None:
        return None
    # With a key-value cache only the last logits of a prefill are computed.
    logits = 1 if timing.decode_tokens else timing.prefill_tokens
    causal = report.after.kind == "causal"
    old, new = (
        result.cost.macs.forward(timing.prefill_tokens, logits, causal)
        for result in (report.before, report.after)
    )
    return old / new if new else None


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
    if dense_products(report.after.cost.execution):
        text = "are decompressed by stock transformers at load, so memory and latency do not "
        text += "change there; vLLM computes from the packed weights."
    else:
        text = "stay packed and are computed from as they are after `import compress`, as they "
        text += "were here; stock transformers decompresses what it can read of them at load."
    yield Finding(level="note", text=f"Weights rounded to few bits{stored} {text}")


def _disk(report: Report) -> Iterator[Finding]:
    if report.before is None:
        return
    before = report.before.cost.size.checkpoint_bytes
    after = report.after.cost.size.checkpoint_bytes
    if not before or not after:
        return
    shipped = report.run.source_bytes
    if shipped is not None:
        yield _against_source(report, shipped, before, after)
    elif after < 0.99 * before:
        yield Finding(level="good", text=f"The checkpoint is {times(before, after)} smaller.")
    elif any("zeros" in step.writes for step in report.steps):
        yield Finding(
            level="note",
            text="The checkpoint is no smaller: zeros are stored like any other value.",
        )


def _against_source(report: Report, shipped: int, before: int, after: int) -> Finding:
    """What was downloaded is what the result is an alternative to, not its unpacked form."""
    what = f" ({report.run.source_format})" if report.run.source_format else ""
    text = (
        f"The source was {human_bytes(shipped)}{what}, unpacked to {human_bytes(before)} to be "
        f"compressed; the checkpoint is {human_bytes(after)}"
    )
    if after > 1.01 * shipped:
        return Finding(level="warning", text=f"{text}: larger than its source.")
    if after < 0.99 * shipped:
        smaller = times(shipped, after)
        return Finding(level="good", text=f"{text}: {smaller} smaller than its source.")
    return Finding(level="note", text=f"{text}: as large as its source.")
