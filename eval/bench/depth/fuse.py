"""Blocks fused into their neighbours, by the shipped recipe; `fuse` learns from 64 x 512 tokens."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from compress.eval.bench import depth
from compress.eval.bench.depth.sizes import learned
from compress.eval.bench.rows import Row

CODE = (
    *depth.CODE, ":!compress/methods/depth/flatten", ":!compress/methods/distill",
    ":!recipes/flattengpt",
)  # fmt: skip


def measure(work: Path, arguments: Namespace) -> list[Row]:
    return learned("fuse", work, arguments)
