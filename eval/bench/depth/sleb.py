"""Blocks removed one by one, by the loss without them: calibrated with 16 x 512 tokens, since each
trial runs the whole model, head and all."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from compress.eval.bench.depth import REMOVAL
from compress.eval.bench.depth.sizes import removals, run, size, steps_of
from compress.eval.bench.options import publish
from compress.eval.bench.rows import Row
from compress.eval.bench.runs import journal

CODE = REMOVAL


def measure(work: Path, arguments: Namespace) -> list[Row]:
    """One search to the largest size, which passes through the smaller ones on its way."""
    counts = sorted(removals(arguments), reverse=True)
    out = run(work, f"sleb-{counts[0]}", steps_of("sleb", counts[0], arguments), arguments)
    (found,) = [event for event in journal(out) if event["event"] == "step"]
    rows = size("sleb", counts[0], [out])
    for removed in counts[1:]:
        blocks = sorted(found["decision"]["order"][:removed])
        out = run(work, f"sleb-{removed}", [{"method": "drop_blocks", "blocks": blocks}], arguments)
        rows += size("sleb", removed, [out], searched=False)
        publish(arguments, work, rows, "depth", whole=False)
    return rows
