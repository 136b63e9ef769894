"""onnxruntime against transformers in float32, and against its own float32."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from compress.eval.bench.masked_models import row
from compress.eval.bench.options import publish, say
from compress.eval.bench.rows import Row
from compress.eval.bench.runtime.exported import (
    CODE,
    GROUPS,
    ONNX,
    TORCH,
    quality,
    speeds,
    subject,
)

__all__ = ["CODE", "measure"]
# Result -> bars of decoding and prefill against transformers, and of decoding against the same
# runtime's float32. Weight-only integers read a prompt no faster than floats do, except in 4 bits.
STEPS: dict[str, list[dict[str, Any]]] = {
    "4 bit": [{"method": "gptq", "bits": 4, "observer": "mse", "embeddings": 4, **GROUPS}],
    "int8": [{"method": "rtn", "bits": 8, "embeddings": 8, **GROUPS}],
    "W8A8": [{"method": "w8a8"}],
}
BARS: dict[str, tuple[float | None, float | None, float | None]] = {
    "4 bit": (9.0, 1.2, 3.5),
    "int8": (6.0, None, 2.0),
    "W8A8": (None, 1.2, None),
}


def measure(work: Path, arguments: Namespace) -> list[Row]:
    on = subject(work, arguments, "onnx")
    original, own = on.in_torch(), on.in_onnx("float32", on.dense)
    say(f"{ONNX}, float32")
    rows = speeds(on.command, f"{ONNX}, float32", f"{TORCH} float32", on.pairs(original, own))
    for name, steps in STEPS.items():
        folder, label = on.result(f"onnx {name}", steps), f"{ONNX}, {name}"
        say(label)
        decode, prefill, own_decode = BARS[name]
        rounded = {} if "embeddings" in steps[-1] else {"embeddings": "8"}
        model = on.in_onnx(name, folder, **rounded)
        paired = on.pairs(original, model)
        rows += speeds(on.command, label, f"{TORCH} float32", paired, decode, prefill)
        rows += speeds(on.command, label, f"{ONNX} float32", on.pairs(own, model), own_decode)
        rows += quality(on.command, label, on.nats(model), on.nats(on.in_torch(folder)))
        size = model.bytes / 1e6
        rows.append(row(on.command, f"{label}: bytes of graph and weights", size, unit="MB"))
        publish(arguments, work, rows, "runtime", whole=False)
    return rows
