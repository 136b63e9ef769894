"""report.html: one self-contained page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from compress.eval.cost.size import human_bytes
from compress.eval.quality.generator import GeneratorResult
from compress.eval.report.label_rows import label_note
from compress.eval.report.page import definitions, figure, page, rows_table, section, table, text
from compress.eval.report.plot import scatter
from compress.eval.report.points import QualityAxis, cost_axes, format_quality, point, quality_axis
from compress.eval.report.rows import cost_rows, count, quality_rows, seconds, times
from compress.eval.report.runtime_rows import HEAD, NOTE, places, runtime_rows
from compress.eval.report.samples import continuations_section, samples_section
from compress.eval.report.schema import Report, RunInfo
from compress.eval.report.verdict import Verdict, short_source, verdict

_MARKS = {"good": "✓", "note": "·", "warning": "!"}


def render_html(report: Report) -> str:
    """Return the report as HTML; everything from outside is escaped, nothing is loaded."""
    return page(
        report.title,
        [
            _header(report),
            _findings(report),
            _plots(report),
            section("Quality", rows_table(quality_rows(report)), _quality_note(report)),
            continuations_section(report),
            samples_section(report),
            section("Cost", rows_table(cost_rows(report)), _cost_note(report)),
            _runtimes(report),
            section("Steps", steps_table(report)),
            section("Data", _data(report)),
            section("What was run", *_run(report)),
            section("Environment", _environment(report)),
        ],
    )


def _header(report: Report) -> str:
    run, found = report.run, verdict(report)
    parts = [short_source(run.model)]
    if run.recipe_name and run.recipe_name != report.title:
        parts.append(f"recipe {run.recipe_name}")
    if run.started:
        parts.append(run.started[:16].replace("T", " "))
    tiles = "".join(
        f'<li class="{tone}"><span class="name">{text(name)}</span>'
        f'<span class="value">{text(value)}</span><span class="from">{text(origin)}</span></li>'
        for name, value, origin, tone in _tiles(report, found)
    )
    said = "" if found is None else f'<p class="verdict {found.tone}">{text(found.text)}</p>'
    return (
        f"<header><h1>{text(report.title)}</h1>"
        f'<p class="lead">{text("  ·  ".join(parts))}</p>{said}'
        f'<ul class="tiles">{tiles}</ul></header>'
    )


def _tiles(report: Report, found: Verdict | None) -> Iterator[tuple[str, str, str, str]]:
    """The three or four numbers that a reader looks for first; that of quality has its colour."""
    for row in quality_rows(report)[:1]:
        origin = f"before {row.before}" if row.before else ""
        yield row.name.split(" (")[0], row.after, origin, found.tone if found else ""
    new = report.after.cost
    old = report.before.cost if report.before else None
    if new.size.checkpoint_bytes:
        first = report.run.source_bytes or (old.size.checkpoint_bytes if old else None)
        ratio = (
            f"{times(new.size.checkpoint_bytes, first)} of {human_bytes(first)}" if first else ""
        )
        yield "On disk", human_bytes(new.size.checkpoint_bytes), ratio, ""
    timing = report.after.latency
    if timing:
        for name, timed in (("Prefill", timing.prefill), ("Decode", timing.decode)):
            if timed:
                low, high = timed.interval
                yield f"{name} speed", f"{timed.speedup:.2f}x", f"{low:.2f} to {high:.2f}", ""
    elif new.memory:
        first = old.memory.prefill if old and old.memory else None
        yield (
            "Peak memory",
            human_bytes(new.memory.prefill),
            f"before {human_bytes(first)}" if first else "",
            "",
        )


def _findings(report: Report) -> str:
    items = "".join(
        f'<li class="{f.level}"><span class="mark" aria-label="{f.level}">{_MARKS[f.level]}</span>'
        f"<span>{text(f.text)}</span></li>"
        for f in report.findings
    )
    return section("Findings", f'<ul class="findings">{items}</ul>' if items else "")


def _plots(report: Report) -> str:
    if report.before is None:
        return ""
    results = [report.before, report.after]
    quality = quality_axis(results)
    if quality is None:
        return ""
    figures = []
    for cost in cost_axes(results):
        points = [
            point("original", report.before, cost, quality, "original"),
            point("compressed", report.after, cost, quality, "frontier"),
        ]
        drawing = scatter(
            points, cost.label, quality.label, cost.format, format_quality, arrow=True
        )
        figures.append(figure(drawing, plot_caption(quality)))
    return section("Quality against cost", f'<div class="plots">{"".join(figures)}</div>')


def plot_caption(quality: QualityAxis) -> str:
    """Say which corner is the good one."""
    side = "up" if quality.higher_is_better else "down"
    return f"Bars are 95 % intervals; {side} and left is better."


def _quality_note(report: Report) -> str:
    notes = []
    if found := report.after.perplexity:
        overlap = "without overlap" if found.stride == found.window else f"stride {found.stride}"
        notes.append(
            f"{found.tokens:,} predicted tokens in windows of {found.window:,} {overlap}; the "
            "first token of a window is context. Intervals (95 %) allow for "
            "neighbouring windows being alike; that of the ratio compares the same windows in "
            "both models, so it is the narrower one."
        )
    if found := report.after.masked:
        notes.append(
            f"{found.masked_positions:,} masked tokens ({found.mask_fraction:.0%} of windows of "
            f"{found.window}, seed {found.seed}); {found.pll_positions:,} positions masked one "
            "at a time for the pseudo-perplexity (Salazar et al. 2020)."
        )
    if report.after.labels:
        notes.append(label_note(report.after.labels))
    if report.after.generator:
        notes += _generator_notes(report.after.generator)
    if found := report.after.tasks:
        limit = f", at most {found.limit} documents a task" if found.limit else ""
        kinds = {"bound": ", answers by the likelihood bound", "pll": ", by pseudo-likelihood"}
        how = kinds.get(found.score, "")
        notes.append(f"Tasks by lm-eval {found.lm_eval}{how}{limit}; ± is 1.96 standard errors.")
    return "".join(f'<p class="small">{text(note)}</p>' for note in notes)


def _generator_notes(found: GeneratorResult) -> Iterator[str]:
    if bound := found.likelihood:
        control = ", token frequencies as control variate" if bound.control else ""
        yield (
            f"The perplexity bound is that of decoding in random order: {bound.sequences:,} "
            f"held-out sequences, {bound.tokens:,} tokens, {bound.draws} masks each "
            f"({bound.estimator} estimator{control}, {bound.evaluations:,} network evaluations, "
            f"seed {bound.seed}). Intervals (95 %) are over sequences."
        )
    if found.ordered:
        first = found.ordered[0]
        yield (
            f"In an order: exact decoding of {first.sequences:,} sequences, one token a step, "
            "without sampling noise."
        )
    if found.recovery:
        yield "Hidden tokens: both models see the same masks; KL is in nats per hidden token."


def _cost_note(report: Report) -> str:
    macs = report.after.cost.macs
    note = (
        "Tied weights count once, packed weights at their unpacked size. Multiply-accumulates "
        f"(MACs) of a token that attends to {macs.context:,} positions include the output "
        f"projection ({count(macs.head)}) and count zeros as work. Peak memory is of a fresh "
        "process that loads the checkpoint and runs one forward, libraries included."
    )
    if report.after.cost.execution:
        note += f" What ran: {report.after.cost.execution}."
    if report.after.latency:
        timing = report.after.latency
        dtypes = " against ".join(dict.fromkeys(timing.dtype))
        note += (
            f" Latency: {timing.repeats} alternating pairs on {timing.device}, {dtypes}, "
            f"{timing.threads} threads; medians, and an interval of the median ratio."
        )
    return f'<p class="small">{text(note)}</p>'


def _runtimes(report: Report) -> str:
    rows = runtime_rows(report)
    if not rows:
        return ""
    ran = "; ".join(place.execution for place in places(report.after) if place.execution)
    note = f'<p class="small">{text(f"{NOTE} What ran: {ran}.")}</p>'
    return section("Runtimes", table(HEAD, rows), note)


def steps_table(report: Report) -> str:
    """The steps with time and memory."""
    head = ("step", "what it did", "options", "time", "peak memory")
    rows = []
    for step in report.steps:
        options = written_options(step.options)
        said = " ".join([step.summary, *step.notes, "(resumed)" if step.resumed else ""]).strip()
        rows.append(
            (
                step.method,
                said,
                options,
                seconds(step.seconds) if step.seconds is not None else "",
                human_bytes(step.peak_rss_bytes) if step.peak_rss_bytes else "",
            )
        )
    return table(head, rows, left=(1, 2))


def written_options(options: dict[str, Any]) -> str:
    """Options of a step as its recipe would say them; those that say nothing are left out."""
    import yaml

    told = {k: v for k, v in options.items() if v not in (None, [], {})}
    flat = yaml.safe_dump(told, default_flow_style=True, sort_keys=False, width=10**6)
    return flat.strip().removeprefix("{").removesuffix("}") if told else ""


def _data(report: Report) -> str:
    head = ("role", "name", "size", "tokens", "licence", "sha256")
    rows = [
        (
            entry.role,
            entry.name + (f": {entry.detail}" if entry.detail else ""),
            human_bytes(entry.bytes) if entry.bytes else "",
            f"{entry.tokens:,}" if entry.tokens else "",
            entry.licence or "",
            (entry.sha256 or "")[:16],
        )
        for entry in report.data
    ]
    return table(head, rows, left=(1,))


def _run(report: Report) -> Iterator[str]:
    import yaml

    run = report.run
    yield definitions(
        [
            ("Model", run.model),
            ("Shipped as", shipped_as(run)),
            ("Weights, sha256", run.model_sha256),
            ("Command", run.command),
            ("Seed", run.seed),
            ("Calibration passes in", run.compute),
            ("Took", seconds(run.seconds) if run.seconds is not None else None),
            ("trust_remote_code", "on" if run.trust_remote_code else None),
            *((f"Imported {name}, sha256", digest) for name, digest in run.imports.items()),
        ]
    )
    if run.recipe is not None:
        recipe = yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True)
        yield f"<pre>{text(recipe)}</pre>"


def shipped_as(run: RunInfo) -> str | None:
    """What the weights were before they were unpacked, where they were."""
    if run.source_bytes is None:
        return None
    return f"{human_bytes(run.source_bytes)}, {run.source_format or 'another format'}"


def _environment(report: Report) -> str:
    machine = report.environment
    versions = ", ".join(f"{k} {v}" for k, v in machine.versions.items())
    return definitions(
        [
            ("Machine", machine.platform),
            ("Processor", f"{machine.cpu}, {machine.cores} cores, {machine.threads} threads used"),
            ("Memory", human_bytes(machine.memory_bytes)),
            ("Accelerator", machine.accelerator),
            ("Versions", versions),
        ]
    )
