"""Flatten, then the whole model learns from the original's predictions, by the shipped recipe."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from compress.eval.bench import depth
from compress.eval.bench.depth.sizes import learned
from compress.eval.bench.rows import Row

CODE = (
    *depth.CODE, "recipes/flattengpt/smollm2-20-distill.yaml", ":!compress/methods/depth/fuse",
)  # fmt: skip


def measure(work: Path, arguments: Namespace) -> list[Row]:
    return learned("distilled", work, arguments)
