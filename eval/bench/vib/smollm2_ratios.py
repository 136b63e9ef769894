"""Gates against widths on SmolLM2, from the rows that both have written."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from compress.eval.bench.options import results
from compress.eval.bench.rows import Row, read_rows
from compress.eval.bench.vib import SMOLLM2, figure
from compress.eval.bench.vib.smollm2 import LABEL, PERPLEXITY, THING

CODE = SMOLLM2


def measure(work: Path, arguments: Namespace) -> list[Row]:
    known = {line.figure: line.value for line in read_rows(results(arguments, work, "vib"))}
    ours, theirs = (
        known.get(f"{LABEL}, {THING.format(thing)}: {PERPLEXITY}")
        for thing in ("vib", "head_width + ffn_width")
    )
    if ours is None or theirs is None:
        return []
    name = f"{LABEL}: {PERPLEXITY} of vib, over that of head_width + ffn_width at its size"
    return [figure("smollm2_ratios", name, ours / theirs, bar=0.5)]
