"""Drawings of measured figures for documents, from the files that benchmarks write.

    python -m compress.eval.bench.drawings

Draws docs/images/depth-parameters.svg and depth-decode.svg: perplexity against what a model with
fewer blocks still weighs, and against how long it takes for a token beside the dense model, from
pairs that ran in turn: times of different runs do not compare.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from compress.errors import CompressError
from compress.eval.bench.options import entry
from compress.eval.bench.provenance import ROOT
from compress.eval.bench.rows import RESULTS, Row, number, read_rows
from compress.eval.report.plot import Point, curves

# Documents have no page around a drawing whose colours it could follow.
_STYLE = """
svg { background: #ffffff; font-family: sans-serif; }
text { fill: #5d6670; font-size: 11.5px; } .label { fill: #1d2126; font-weight: 600; }
.grid { stroke: #e3e1dc; } .axis { stroke: #5d6670; }
.dot { fill: #5d6670; stroke: #ffffff; } .front { fill: none; stroke: #5d6670; opacity: .7; }
.dot.frontier { fill: #0f5f8c; } .front.frontier { stroke: #0f5f8c; }
.dot.original { fill: #1d2126; }
"""
_WORD = "SmolLM2"
_SPEED = "decode speed-up"
_COSTS = {
    "depth-parameters": ("parameters", "parameters, millions"),
    "depth-decode": (_SPEED, "time of a token / that of the dense model"),
}


def series(rows: list[Row], cost: str) -> dict[str, list[Point]]:
    """Of each method its points (cost, perplexity), from rows "SmolLM2, METHOD -N blocks: …"."""
    values = {f"{_WORD}, dense: {_SPEED}": 1.0} | {row.figure: row.value for row in rows}
    found: dict[str, list[Point]] = {}
    for figure, value in values.items():
        thing, _, measure = figure.removeprefix(f"{_WORD}, ").rpartition(": ")
        spent = values.get(f"{_WORD}, {thing}: {cost}")
        if measure != "perplexity" or spent is None or not figure.startswith(f"{_WORD}, "):
            continue
        method = thing.partition(" -")[0]
        found.setdefault(method, []).append(
            Point(thing, 1 / spent if cost == _SPEED else spent, value)
        )
    return found


def drawn(rows: list[Row], cost: str, label: str) -> str:
    """The drawing as a document of its own; each method's line begins at the dense model.

    Raises:
        CompressError: nothing was measured yet.
    """
    lines = series(rows, cost)
    dense = lines.pop("dense", [])
    if not lines:
        raise CompressError(
            f'rows of eval/results/depth.json named "{_WORD}, METHOD -N blocks: perplexity"',
            "none", "Measure first: python -m compress.eval.bench.depth",
        )  # fmt: skip
    named = [
        (name, "frontier" if name in ("flatten", "fuse", "distilled") else "other", dense + points)
        for name, points in sorted(lines.items())
    ]
    return page(curves(named, label, "perplexity", number, number))


def page(body: str) -> str:
    """A drawing as a document of its own."""
    opening = body.index(">") + 1
    head = body[:opening].replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    return f"{head}<style>{_STYLE}</style>{body[opening:]}\n"


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "--results", type=Path, default=RESULTS, metavar="DIR", help="folder of the JSON files"
    )
    arguments = options.parse_args()
    rows = read_rows(arguments.results / "depth.json")
    for name, (cost, label) in _COSTS.items():
        path = ROOT / "docs" / "images" / f"{name}.svg"
        path.write_text(drawn(rows, cost, label), encoding="utf-8")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    entry(main)
