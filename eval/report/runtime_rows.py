"""Other runtimes in a report: where the result runs how fast, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from compress.eval.cost.latency import PairedTimes
from compress.eval.cost.size import human_bytes
from compress.eval.report.cells import number, times
from compress.eval.report.schema import Finding, Report
from compress.eval.report.verdicts import speed
from compress.eval.spec import EvaluationResult, RuntimeResult, ToleranceSpec

NAMES = {"torch": "transformers", "onnx": "onnxruntime", "gguf": "llama.cpp"}
HEAD = (
    "result in", "on disk", "peak memory", "perplexity", "prefill", "decode",
    "prefill, of the runtime's float32", "decode, of the runtime's float32",
)  # fmt: skip
NOTE = (
    "Speeds are against the original in transformers in float32, and against the original in the "
    "same runtime in float32 (the last two columns): what the first show beyond the second is the "
    "runtime's doing, not that of the compression. Alternating pairs, medians, [intervals]. On "
    "disk: all files, tokenizer and config included. Peak memory: a fresh process that loads the "
    "model and runs one forward, libraries included, torch among them."
)
_QUALITY = 0.005  # relative change of a perplexity that is called one


class Place(NamedTuple):
    """One runtime that a result was measured in."""

    runtime: str
    execution: str
    bytes: int | None
    memory: int | None
    perplexity: float | None
    prefill: PairedTimes | None
    decode: PairedTimes | None
    own_prefill: PairedTimes | None
    own_decode: PairedTimes | None

    @property
    def name(self) -> str:
        return NAMES[self.runtime]


def places(result: EvaluationResult) -> list[Place]:
    """transformers and the other runtimes; nothing where there are no others."""
    if not result.runtimes:
        return []
    cost, timed = result.cost, result.latency
    first = Place(
        "torch", cost.execution, cost.size.checkpoint_bytes, cost.memory and cost.memory.prefill,
        _perplexity(result), timed and timed.prefill, timed and timed.decode,
        timed and timed.prefill, timed and timed.decode,
    )  # fmt: skip
    return [first, *map(_place, result.runtimes)]


def _place(found: RuntimeResult) -> Place:
    timed, own = found.latency, found.own_latency
    return Place(
        found.runtime, found.execution, found.bytes, found.memory and found.memory.prefill,
        _perplexity(found), timed and timed.prefill, timed and timed.decode,
        own and own.prefill, own and own.decode,
    )  # fmt: skip


def _perplexity(found: EvaluationResult | RuntimeResult) -> float | None:
    if found.perplexity:
        return found.perplexity.perplexity
    return found.masked and found.masked.pseudo_perplexity


def runtime_rows(report: Report) -> list[tuple[str, ...]]:
    """A row a runtime under :data:`HEAD`, the original's own in front where there is one."""
    found = places(report.after)
    if not found:
        return []
    rows = []
    before = report.before
    if before is not None:
        size, memory = before.cost.size.checkpoint_bytes, before.cost.memory
        rows.append(
            ("the original in transformers", _bytes(size), _bytes(memory and memory.prefill),
             number(_perplexity(before)), "1", "1", "1", "1")
        )  # fmt: skip
    for place in found:
        rows.append(
            (place.name, _bytes(place.bytes), _bytes(place.memory), number(place.perplexity),
             _shown(place.prefill), _shown(place.decode), _shown(place.own_prefill),
             _shown(place.own_decode))
        )  # fmt: skip
    return rows


def _bytes(value: int | None) -> str:
    return "" if value is None else human_bytes(value)


def _shown(timed: PairedTimes | None) -> str:
    if timed is None:
        return ""
    low, high = timed.interval
    return f"{timed.speedup:.2f}x [{low:.2f}, {high:.2f}]"


def runtime_findings(report: Report) -> Iterator[Finding]:
    """Which runtime to use for what, what of it the compression did, and what became smaller."""
    found = places(report.after)
    tolerance = report.after.spec.tolerance
    for place in found[1:]:
        yield from _speeds(place, tolerance)
        yield from _quality(place, found[0])
        yield from _smaller(place, report)
    yield from _advice(found)


def _speeds(place: Place, tolerance: ToleranceSpec) -> Iterator[Finding]:
    for what, timed, own in (
        ("decode", place.decode, place.own_decode),
        ("prefill", place.prefill, place.own_prefill),
    ):
        if timed is None or own is None:
            continue
        told, gained = speed(timed.interval, tolerance), speed(own.interval, tolerance)
        text = (
            f"In {place.name}, {what} is {_shown(timed)} as fast as the original in transformers "
            f"and {_shown(own)} as fast as the original in {place.name}"
        )
        if gained == "slower":
            text += ", so compression costs time there"
        elif gained != "faster":
            text += ", so compression gains nothing there"
        level = "good" if told == "faster" else "warning" if told == "slower" else "note"
        yield Finding(level=level, text=f"{text}.")


def _quality(place: Place, here: Place) -> Iterator[Finding]:
    if place.perplexity is None or here.perplexity is None:
        return
    factor = place.perplexity / here.perplexity
    if abs(factor - 1) > _QUALITY:
        yield Finding(
            level="warning" if factor > 1 else "note",
            text=f"Perplexity in {place.name} is {times(factor, 1)} that of the same result in "
            f"transformers ({number(place.perplexity)} and {number(here.perplexity)}): inputs of "
            "products are rounded there.",
        )


def _smaller(place: Place, report: Report) -> Iterator[Finding]:
    shipped, told = report.run.source_bytes, "that were downloaded"
    if shipped is None and report.before is not None:
        shipped, told = report.before.cost.size.checkpoint_bytes, "of the original's weights"
    if not shipped or not place.bytes:
        return
    text = (
        f"Exported for {place.name} it takes {human_bytes(place.bytes)}, all files, of the "
        f"{human_bytes(shipped)} {told}"
    )
    if place.bytes < 0.99 * shipped:
        yield Finding(level="good", text=f"{text}: {times(shipped, place.bytes)} smaller.")
    elif place.bytes > 1.01 * shipped:
        yield Finding(level="warning", text=f"{text}: larger.")
    else:
        yield Finding(level="note", text=f"{text}: no smaller.")


def _advice(found: list[Place]) -> Iterator[Finding]:
    """Speeds are all against the original in transformers, so that runtimes can be compared."""
    parts = []
    for what, of in (
        ("to generate text", lambda p: p.decode and p.decode.speedup),
        ("to read long inputs", lambda p: p.prefill and p.prefill.speedup),
        ("for the least memory", lambda p: p.memory and 1 / p.memory),
    ):
        ranked = sorted((p for p in found if of(p)), key=of, reverse=True)
        if len(ranked) > 1:
            parts.append(f"{what}, {ranked[0].name}")
    if parts:
        text = "; ".join(parts)
        yield Finding(level="note", text=f"What to run the result with: {text}.")
