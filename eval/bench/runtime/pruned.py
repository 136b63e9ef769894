"""Narrower and quantised at once: how much of the product of both speed-ups is left.

Each speed-up is over the original in float32 in the same runtime. Calibration is short: what a
step keeps is of no matter for how fast it runs.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compress.eval.bench.masked_models import row
from compress.eval.bench.options import publish, say
from compress.eval.bench.rows import Row
from compress.eval.bench.runtime.exported import (
    CODE,
    GROUPS,
    LLAMA,
    ONNX,
    TORCH,
    has_llama,
    speedups,
    subject,
)

__all__ = ["CODE", "measure"]
NARROW = {"method": "ffn_width", "share": 0.25, "round_to": 64}
ROUND = {"method": "rtn", "bits": 4, **GROUPS}
RESULTS = {"narrower": [NARROW], "4 bit": [ROUND], "both": [NARROW, ROUND]}
KEPT = 0.8  # of the product, at least


def measure(work: Path, arguments: Namespace) -> list[Row]:
    on = subject(work, arguments, "pruned")
    folders = {name: on.result(f"pruned {name}", steps) for name, steps in RESULTS.items()}
    openers: dict[str, Callable[..., Any]] = {
        TORCH: lambda name, folder: on.in_torch(folder),
        ONNX: on.in_onnx,
    }
    if has_llama():
        openers[LLAMA] = on.in_llama
    rows: list[Row] = []
    for runtime, opened in openers.items():
        original = opened("float32", on.dense)
        found = {}
        for name, folder in folders.items():
            say(f"{runtime}, {name}")
            found[name] = speedups(on.pairs(original, opened(f"pruned {name}", folder)))
        for what in ("decode", "prefill"):
            alone = {name: speed[what] for name, speed in found.items()}
            product = alone["narrower"] * alone["4 bit"]
            label = f"{runtime}, FFN -25 % and 4 bit: {what}"
            rows += [
                row(on.command, f"{label}: speed-up over that of both alone, multiplied",
                    alone["both"] / product, op=">=", bar=KEPT),
                *(row(on.command, f"{label}: speed-up of {name}", value, unit="x", op=">=")
                  for name, value in alone.items()),
            ]  # fmt: skip
        publish(arguments, work, rows, "runtime", whole=False)
    return rows
