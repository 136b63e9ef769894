"""As `distilled`, with adapters that learn beside weights that stay, by the shipped recipe."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from compress.eval.bench import depth
from compress.eval.bench.depth.sizes import learned, removals
from compress.eval.bench.rows import Row

CODE = (
    *depth.CODE, "recipes/flattengpt/smollm2-20-lora.yaml", ":!compress/methods/depth/fuse",
)  # fmt: skip


def measure(work: Path, arguments: Namespace) -> list[Row]:
    return learned("adapters", work, arguments, removals(arguments)[:1])
