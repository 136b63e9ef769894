"""One-shot methods in float32 and in bfloat16, beside llm-compressor in both.

The model, the token ids, the settings and the evaluator are those of compress.eval.bench.peers.
Times are of whole processes. Where products of bfloat16 matrices are not fast there is nothing to
measure: the one row that is written says so.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

from compress.eval.bench.options import say
from compress.eval.bench.peer_environment import peer_python
from compress.eval.bench.peer_material import FULL, SMOKE, Material, prepare
from compress.eval.bench.peers import PEER, SETTINGS, run_one
from compress.eval.bench.rows import Row
from compress.precision import fast_bfloat16, product_speed

COMMAND = "python -m compress.eval.bench.robust --only compute"
TYPES = ("float32", "bfloat16")
REPEATS = 1


def measure(work: Path, arguments: argparse.Namespace) -> list[Row]:
    """Rows of every method; each run that is finished is kept in ``work``."""
    ratio = product_speed(torch.bfloat16) / product_speed(torch.float32)
    rows = [
        _row("Products of bfloat16 matrices: speed, bfloat16 / float32", ratio, None, ">=")
    ]  # fmt: skip
    if not fast_bfloat16() and not arguments.smoke:
        say("bfloat16 is not fast on this machine: its bars cannot be measured here")
        return rows
    root = arguments.data_root
    root = root.expanduser().absolute() if root else None
    python = peer_python(None)
    material = prepare(work, SMOKE if arguments.smoke else FULL, root)
    for name in SETTINGS:
        rows += _rows(name, _runs(name, material, work, python, root))
    for path in work.glob(f"{material.key}-*.json"):
        path.unlink()  # the rows are complete: the next call measures anew
    return rows


def _runs(
    name: str, material: Material, work: Path, python: Path, root: Path | None
) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Runs of one method by tool and type, in turn."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for repeat in range(REPEATS):
        for compute in TYPES:
            for tool in ("ours", "peer"):
                run = run_one(tool, name, repeat, material, work, python, root, compute)
                found.setdefault((tool, compute), []).append(run)
    return found


def _rows(name: str, runs: dict[tuple[str, str], list[dict[str, Any]]]) -> list[Row]:
    def median(tool: str, compute: str, what: str) -> float:
        return statistics.median(run[what] for run in runs[tool, compute])

    label = SETTINGS[name].label
    mine = median("ours", "bfloat16", "seconds")
    rows = [
        _row(
            f"{label}: perplexity, ours in bfloat16 / ours in float32",
            median("ours", "bfloat16", "perplexity") / median("ours", "float32", "perplexity"),
            1.005,
        )
    ]
    for compute, bar in zip(TYPES, (0.35, 0.6), strict=True):
        theirs = median("peer", compute, "seconds")
        rows.append(
            _row(f"{label}: time, ours in bfloat16 / {PEER} in {compute}", mine / theirs, bar)
        )
    for compute in TYPES:
        rows.append(
            Row(
                figure=f"{label}: time in {compute}", value=median("ours", compute, "seconds"),
                unit="s", op="<=", bar=None, peer=median("peer", compute, "seconds"),
                command=COMMAND,
            )
        )  # fmt: skip
    return rows


def _row(figure: str, value: float, bar: float | None, op: str = "<=") -> Row:
    return Row(
        figure=figure, value=value, unit="", op=op, bar=bar, peer=None, command=COMMAND
    )  # fmt: skip
