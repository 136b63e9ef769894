"""Narrower and quantised at once: how much of the product of both speed-ups is left.

Each speed-up is over the original in float32 in the same runtime. A machine is another one from
one quarter of an hour to the next, so all three results are timed in each of several rounds, and
what is left of the product is the median over the rounds. Calibration is short: what a step keeps
is of no matter for how fast it runs.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
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
ROUNDS, PAIRS = 3, 3


def measure(work: Path, arguments: Namespace) -> list[Row]:
    on = subject(work, arguments, "pruned")
    on = replace(on, scale=replace(on.scale, pairs=PAIRS))
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
        models = {name: opened(f"pruned {name}", folder) for name, folder in folders.items()}
        rounds = []
        for number in range(ROUNDS):
            say(f"{runtime}, round {number + 1} of {ROUNDS}")
            rounds.append({n: speedups(on.pairs(original, m)) for n, m in models.items()})
        for what in ("decode", "prefill"):
            label = f"{runtime}, FFN -25 % and 4 bit: {what}"
            kept = median(
                found["both"][what] / (found["narrower"][what] * found["4 bit"][what])
                for found in rounds
            )
            rows += [
                row(on.command, f"{label}: speed-up over that of both alone, multiplied", kept,
                    op=">=", bar=KEPT),
                *(row(on.command, f"{label}: speed-up of {name}",
                      median(found[name][what] for found in rounds), unit="x", op=">=")
                  for name in models),
            ]  # fmt: skip
        publish(arguments, work, rows, "runtime", whole=False)
    return rows
