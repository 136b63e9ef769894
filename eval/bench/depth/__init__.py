"""Fewer blocks: what eval/results/depth.json holds, a module a part.

SmolLM2-135M-Instruct in float32, calibrated with 128 x 512 tokens of WikiText-2 raw train, tested
on the first 32,768 tokens of its test split in windows of 1,024.
"""

from __future__ import annotations

from typing import Any

from compress.eval.bench.masked_models import row
from compress.eval.bench.provenance import DEFAULT, NO_TRAINING
from compress.eval.bench.rows import Row

# Of everything that `compress run` may execute, what no part of this benchmark does.
CODE = (
    *DEFAULT, "eval/bench/depth/sizes.py", ":!compress/generators", ":!compress/methods/factorize",
    ":!compress/methods/quantize", ":!compress/methods/sparsity", ":!compress/runtimes",
    ":!compress/train/create",
)  # fmt: skip
# Of that, what blocks take that are fused, put side by side, or removed.
FUSING = (
    *CODE, "recipes/fusegpt/smollm2-20.yaml", ":!compress/methods/depth/flatten",
    ":!compress/methods/distill",
)  # fmt: skip
FLATTENING = (
    *CODE, "recipes/flattengpt/smollm2-20.yaml", ":!compress/methods/depth/fuse",
    ":!compress/methods/distill",
)  # fmt: skip
REMOVAL = (
    *CODE, *NO_TRAINING, ":!compress/methods/depth/flatten", ":!compress/methods/depth/fuse",
    ":!compress/methods/distill",
)  # fmt: skip

LABEL = "SmolLM2"
REMOVED = (6, 3, 9)  # the first one has the bars
SEEDS = (0, 1, 2)  # of what learns


def figure(part: str, name: str, value: float, **more: Any) -> Row:
    """A row of a part."""
    return row(f"python -m compress.eval.bench.depth --only {part}", name, value, **more)
