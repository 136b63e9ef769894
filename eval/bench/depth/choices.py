"""Flatten of 6 blocks with one option changed at a time."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from compress.eval.bench.depth import FLATTENING, LABEL, figure
from compress.eval.bench.depth.sizes import perplexity, removals, run, steps_of
from compress.eval.bench.options import publish
from compress.eval.bench.rows import Row

CODE = FLATTENING
_CHOICES = {
    "group 2": {"group": 2}, "ridge 10": {"ridge": 10.0},
    "no attention correction": {"attention_correction": False}, "no refit": {"refit": False},
}  # fmt: skip


def measure(work: Path, arguments: Namespace) -> list[Row]:
    (step,) = steps_of("flatten", removals(arguments)[0], arguments)
    rows = []
    for name, change in _CHOICES.items():
        out = run(work, f"choice-{name.replace(' ', '-')}", [{**step, **change}], arguments)
        label = f"{LABEL} flatten options, {name}: perplexity"
        rows.append(figure("choices", label, perplexity(out)))
        publish(arguments, work, rows, "depth", whole=False)
    return rows
