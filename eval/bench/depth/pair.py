"""The most similar pair of blocks in one of twice the width."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from compress.eval.bench.depth import FLATTENING, LABEL, figure
from compress.eval.bench.depth.sizes import report_of, run
from compress.eval.bench.rows import Row

CODE = FLATTENING


_REFIT = {"": True, ", nothing fitted": False}


def measure(work: Path, arguments: Namespace) -> list[Row]:
    """What the method returns, whose last linear is fitted, and what it begins with."""
    rows = []
    for words, refit in _REFIT.items():
        step = {"method": "flatten", "remove": 1, "restore_width": False, "refit": refit}
        report = report_of(run(work, "pair" if refit else "pair-unfitted", [step], arguments))
        ratio = report.after.perplexity.perplexity / report.before.perplexity.perplexity
        label = f"{LABEL}, most similar pair side by side, width not restored{words}"
        bar = 1.03 if refit else None
        rows.append(figure("pair", f"{label}: perplexity / dense", ratio, bar=bar))
    return rows
