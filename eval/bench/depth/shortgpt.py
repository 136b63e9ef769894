"""Blocks removed at once, by how little they turn the hidden states; and the dense model."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from compress.eval.bench.depth import REMOVAL
from compress.eval.bench.depth.sizes import dense, removals, run, sizes, steps_of
from compress.eval.bench.rows import Row

CODE = REMOVAL


def measure(work: Path, arguments: Namespace) -> list[Row]:
    rows = sizes("shortgpt", work, arguments)
    first = removals(arguments)[0]
    steps = steps_of("shortgpt", first, arguments)
    return rows + dense("shortgpt", run(work, f"shortgpt-{first}", steps, arguments))
