"""Forward of one text of 512 tokens: `full` at half the size against the dense model."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import torch

from compress.eval.bench.options import say
from compress.eval.bench.rows import Row
from compress.eval.bench.vib import SST2, figure
from compress.eval.bench.vib.sst2 import SHARES, base_model, label, of_mode
from compress.eval.cost.latency import paired_latency
from compress.models.sources.source import load_model

CODE = SST2


def measure(work: Path, arguments: Namespace) -> list[Row]:
    out = of_mode(work, "full", SHARES[0], 0, arguments)
    original = load_model(base_model(work, arguments), dtype=torch.float32)
    smaller = load_model(out / "model", dtype=torch.float32)
    say("15 pairs of prefill")
    paired = paired_latency(original, smaller, repeats=3 if arguments.smoke else 15)
    words = f"{label('full', SHARES[0])}, paired: prefill speed-up"
    low, high = paired.prefill.interval
    return [
        figure("speed", words, paired.prefill.speedup, unit="x", op=">=", bar=1.6),
        figure("speed", f"{words}, from", low, unit="x", op=">="),
        figure("speed", f"{words}, to", high, unit="x", op=">="),
    ]
