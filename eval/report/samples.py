"""Samples in a report: pictures side by side, curves over the number of steps, the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from compress.eval.quality.generation import GenerationResult, StepPoint
from compress.eval.report.cells import count, error_of, number
from compress.eval.report.page import figure, section, table, text
from compress.eval.report.plot import Point, curves
from compress.eval.report.runtime_rows import NAMES
from compress.eval.report.schema import Report


class Curve(NamedTuple):
    """A quality of samples over the number of steps."""

    label: str
    of: Callable[[StepPoint], tuple[float, float | None]]  # value and standard error
    higher_is_better: bool


def curve_kinds(found: GenerationResult) -> list[Curve]:
    """The qualities that these samples were judged by."""
    point, kinds = found.points[0], []
    if point.images:
        name = f"FD({found.encoder.name}), lower is better"
        kinds.append(Curve(name, lambda p: (p.images.frechet, p.images.frechet_stderr), False))
        if point.images.accuracy is not None:
            kinds.append(
                Curve(
                    "class accuracy of samples, higher is better",
                    lambda p: (p.images.accuracy, p.images.accuracy_stderr), True,
                )
            )  # fmt: skip
    if point.text and point.text.perplexity is not None:
        name = f"genPPL({found.scorer}), lower is better"
        kinds.append(Curve(name, lambda p: (p.text.perplexity, None), False))
    if point.text:
        name = "unigram entropy of samples, nats"
        kinds.append(Curve(name, lambda p: (p.text.unigram_entropy, None), True))
    return kinds


def _pairs(report: Report) -> list[tuple[str, GenerationResult]]:
    """The original and the compressed model, as far as they have samples."""
    named = (("original", report.before), ("compressed" if report.before else "", report.after))
    return [
        (name, result.generator.generation)
        for name, result in named
        if result and result.generator and result.generator.generation
    ]


def continuations_section(report: Report) -> str:
    """Beginnings of the text, and how the models go on with each, side by side."""
    parts = []
    for prompt, told in continued(report):
        columns = "".join(f"<p><b>{text(name)}</b>{text(said)}</p>" for name, said in told)
        parts.append(f'<div class="texts"><p><b>text</b>{text(prompt)}</p>{columns}</div>')
    note = '<p class="small">The likeliest tokens, one by one; to be read, not scored.</p>'
    return section("Continuations", *parts, note) if parts else ""


def continued(report: Report) -> list[tuple[str, list[tuple[str, str]]]]:
    """Each beginning with what follows: name of a model and its words, the original first."""
    after = report.after.continuations
    before = report.before.continuations if report.before else ()
    if [c.prompt for c in before] != [c.prompt for c in after]:
        return [(c.prompt, [("model", c.text)]) for c in after] if not before else []
    named = [("original", before), ("compressed", after)]
    named += [(f"compressed, {NAMES[r.runtime]}", r.continuations) for r in report.after.runtimes]
    return [
        (new.prompt, [(name, said[i].text) for name, said in named if len(said) > i])
        for i, new in enumerate(after)
    ]


def samples_section(report: Report) -> str:
    """Pictures side by side, a plot a quality, and the table behind the plots."""
    pairs = _pairs(report)
    if not pairs:
        return ""
    pictures = "".join(_picture(name, found) for name, found in pairs if found.picture)
    texts = [(name, excerpt) for name, found in pairs for excerpt in found.excerpts]
    head, rows = samples_table(report)
    drawings = [
        figure(
            curves(
                [
                    (name, style, [_point(p, kind) for p in found.points])
                    for (name, found), style in zip(pairs, _styles(pairs), strict=True)
                ],
                "network evaluations per sample", kind.label, count, lambda v: f"{v:,.6g}",
            ),
            "Joined: the same model with more sampler steps.",
        )
        for kind in curve_kinds(pairs[-1][1])
    ]  # fmt: skip
    return section(
        "Samples",
        f'<div class="plots">{pictures}</div>' if pictures else "",
        f'<div class="plots">{"".join(drawings)}</div>' if drawings else "",
        table(head, rows),
        table(("model", "begins"), texts, left=(1,)),
        _note(pairs[-1][1]),
    )


def samples_table(report: Report) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows: one row a model and number of steps."""
    pairs = _pairs(report)
    kinds = curve_kinds(pairs[-1][1]) if pairs else []
    head = (
        "model", "steps", "evaluations", "block forwards", *(k.label.split(",")[0] for k in kinds)
    )  # fmt: skip
    rows = []
    for name, found in pairs:
        for point in found.points:
            values = [_cell(*kind.of(point)) for kind in kinds]
            cost = (count(point.evaluations), count(point.block_forwards))
            rows.append((name, str(point.steps), *cost, *values))
    return head, rows


def _cell(value: float, error: float | None) -> str:
    return f"{number(value)} {error_of(error)}".strip()


def _point(point: StepPoint, kind: Curve) -> Point:
    value, error = kind.of(point)
    low, high = (None, None) if error is None else (value - 1.96 * error, value + 1.96 * error)
    return Point(str(point.steps), point.evaluations, value, low, high)


def _styles(pairs: list) -> list[str]:
    return ["original", "frontier"] if len(pairs) == 2 else ["frontier"]


def _picture(name: str, found: GenerationResult) -> str:
    shown = found.picture
    caption = f"{name}: {shown.caption}" if name else shown.caption
    # The address is base64 that the schema has checked; nothing in it can end the attribute.
    image = (
        f'<img class="samples" width="{4 * shown.width}" height="{4 * shown.height}" '
        f'alt="{text(f"samples, {caption}")}" src="data:image/png;base64,{shown.png}">'
    )
    return figure(image, caption)


def _note(found: GenerationResult) -> str:
    options = ", ".join(f"{k} {v}" for k, v in found.sampler.items() if v is not None)
    notes = [
        f"{found.samples} samples of {found.length} tokens at each number of steps, seed "
        f"{found.seed}; seeds and classes are the same for both models. Sampler: {options}."
    ]
    if found.encoder:
        judge = found.encoder
        notes.append(
            f"Images are judged by a classifier trained on {judge.data} alone ({judge.name}, "
            f"{judge.test_accuracy:.1%} of its test images right). FD({judge.name}) is the Frechet "
            "distance between its features of samples and of the real training images; real test "
            f"images are at {number(judge.frechet_floor)}. It is not comparable with FID."
        )
    if found.scorer:
        notes.append(
            f"genPPL: perplexity under {found.scorer}. Repetition lowers it, so it only counts at "
            "equal entropy."
        )
    return "".join(f'<p class="small">{text(note)}</p>' for note in notes)
