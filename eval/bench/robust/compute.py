"""One-shot methods in float32 and in bfloat16, beside llm-compressor in both.

The model, the token ids, the settings and the evaluator are those of compress.eval.bench.peers.
Times are of whole processes. A pruned model of this size is chaotic: a damping of 0.0101 instead of
0.01 moved SparseGPT's perplexity by 7 % (16 x 512 tokens, all in float32), so ratios of perplexity
are medians over draws of the calibration windows, with their range. Where products of bfloat16
matrices are not fast there is nothing to measure: the one row that is written says so.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

from compress.eval.bench.options import publish, say
from compress.eval.bench.peer_environment import peer_python
from compress.eval.bench.peer_material import FULL, SMOKE, Material, prepare
from compress.eval.bench.peers import PEER, SETTINGS, run_one
from compress.eval.bench.provenance import DEFAULT, NO_TRAINING
from compress.eval.bench.rows import Row
from compress.system.precision import fast_bfloat16, product_speed
from compress.system.threads import threads

COMMAND = "python -m compress.eval.bench.robust --only compute"
CODE = (*DEFAULT, *NO_TRAINING, "eval/bench/peers.py", "eval/bench/peer_worker.py")
TYPES = ("float32", "bfloat16")
# Windows of the text that ours is calibrated on; the first ones are the peer's.
DRAWS = 3


def measure(work: Path, arguments: argparse.Namespace) -> list[Row]:
    """Rows of every method; each run that is finished is kept in ``work``."""
    with threads(1):  # as `compute: auto` decides: threads wait for each other on a busy machine
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
    # Published one by one: all of them take an hour. First what is timed, which wants the machine
    # for itself, then what only perplexity is wanted of.
    runs = {name: Runs() for name in SETTINGS}
    for draws, rows_of in ((range(1), _times), (range(1, DRAWS), _perplexities)):
        for name, found in runs.items():
            for draw in draws:
                _run(found, name, draw, material, work, python, root)
            rows += rows_of(name, found)
            publish(arguments, work, rows, "robust", whole=False)
    for path in work.glob(f"{material.key}-*.json"):
        path.unlink()  # the rows are complete: the next call measures anew
    return rows


Runs = dict[tuple[str, str, int], dict[str, Any]]  # by tool, type and draw


def _run(
    found: Runs,
    name: str,
    draw: int,
    material: Material,
    work: Path,
    python: Path,
    root: Path | None,
) -> None:
    """All runs of one method on one draw; the other tool's only on the first."""
    for compute in TYPES:
        for tool in ("ours", "peer") if draw == 0 else ("ours",):
            found[tool, compute, draw] = run_one(
                tool, name, 0, material, work, python, root, compute, draw, tool == "ours"
            )


def _times(name: str, runs: Runs) -> list[Row]:
    label = SETTINGS[name].label
    mine = runs["ours", "bfloat16", 0]["seconds"]
    rows = []
    for compute, bar in zip(TYPES, (0.35, 0.6), strict=True):
        theirs = runs["peer", compute, 0]["seconds"]
        rows.append(
            _row(f"{label}: time, ours in bfloat16 / {PEER} in {compute}", mine / theirs, bar)
        )
    for compute in TYPES:
        rows.append(
            Row(
                figure=f"{label}: time in {compute}", value=runs["ours", compute, 0]["seconds"],
                unit="s", op="<=", bar=None, peer=runs["peer", compute, 0]["seconds"],
                command=COMMAND,
            )
        )  # fmt: skip
    return rows


def _perplexities(name: str, runs: Runs) -> list[Row]:
    ratios = [
        runs["ours", "bfloat16", draw]["perplexity"] / runs["ours", "float32", draw]["perplexity"]
        for draw in range(DRAWS)
    ]
    return [
        Row(
            figure=f"{SETTINGS[name].label}: perplexity, ours in bfloat16 / ours in float32",
            value=statistics.median(ratios), unit="", op="<=", bar=1.005, peer=None,
            command=COMMAND, range=(min(ratios), max(ratios)), seeds=DRAWS,
        )
    ]  # fmt: skip


def _row(figure: str, value: float, bar: float | None, op: str = "<=") -> Row:
    return Row(
        figure=figure, value=value, unit="", op=op, bar=bar, peer=None, command=COMMAND
    )  # fmt: skip
