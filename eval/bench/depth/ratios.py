"""What the methods are to each other at 6 blocks, from the rows that other parts have written."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from compress.eval.bench import depth
from compress.eval.bench.depth import LABEL, figure
from compress.eval.bench.options import results
from compress.eval.bench.rows import Row, read_rows

CODE = depth.CODE
_BARS = {
    ("flatten -6 blocks", "shortgpt -6 blocks"): 0.6,
    ("flatten -6 blocks", "sleb -6 blocks"): 1.0,
    ("fuse -6 blocks", "flatten -6 blocks"): 1.0,
    ("distilled -6 blocks", "dense"): 1.5,
}


def measure(work: Path, arguments: Namespace) -> list[Row]:
    """The bars; where one side was measured with several seeds, of their median and range."""
    measured = {row.figure: row for row in read_rows(results(arguments, work, "depth"))}
    found = []
    for (one, other), bar in _BARS.items():
        above = measured.get(f"{LABEL}, {one}: perplexity")
        below = measured.get(f"{LABEL}, {other}: perplexity")
        if above is None or below is None:
            continue
        over = {} if above.range is None else {
            "range": tuple(value / below.value for value in above.range), "seeds": above.seeds,
        }  # fmt: skip
        name = f"{LABEL}: perplexity of {one}, over that of {other}"
        found.append(figure("ratios", name, above.value / below.value, bar=bar, **over))
    return found
