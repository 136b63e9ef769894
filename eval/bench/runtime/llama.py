"""llama.cpp with our GPTQ against float32, and against its own rounding of the same model."""

from __future__ import annotations

import math
from argparse import Namespace
from pathlib import Path

from compress.eval.bench.masked_models import row
from compress.eval.bench.options import say
from compress.eval.bench.rows import Row
from compress.eval.bench.runtime.exported import (
    CODE,
    GROUPS,
    LLAMA,
    TORCH,
    has_llama,
    quality,
    speeds,
    subject,
)

__all__ = ["CODE", "measure"]


def measure(work: Path, arguments: Namespace) -> list[Row]:
    if not has_llama():
        return []
    on = subject(work, arguments, "llama")
    name, label = "4 bit", f"{LLAMA}, 4 bit"
    folder = on.result(name, [{"method": "gptq", "bits": 4, **GROUPS}])
    ours = on.in_llama("gptq", folder, embeddings="Q8_0")
    theirs = on.in_llama("q4_0", on.dense, type="Q4_0", embeddings="Q8_0")
    say(label)
    rows = speeds(on.command, label, f"{TORCH} float32", on.pairs(on.in_torch(), ours), decode=8.0)
    floats = on.in_llama("f32", on.dense, type="F32")
    rows += speeds(on.command, label, f"{LLAMA} float32", on.pairs(floats, ours))
    # Embeddings are rounded by the export alone, so transformers runs them in floats.
    there, here = on.nats(ours), on.nats(on.in_torch(folder))
    rows += quality(on.command, label, there, here, bar=0.5)
    rows += [
        row(on.command, f"{LLAMA}: perplexity of our GPTQ, over that of its own Q4_0",
            math.exp(there - on.nats(theirs)), bar=1.0),
        row(on.command, f"{LLAMA}: bytes of our GPTQ, over those of its own Q4_0",
            ours.bytes / theirs.bytes, bar=1.0),
    ]  # fmt: skip
    return rows
