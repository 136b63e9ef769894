"""Blocks fused into their neighbours, by the shipped recipe; `fuse` learns from 64 x 512 tokens."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from compress.eval.bench.depth import FUSING
from compress.eval.bench.depth.sizes import learned
from compress.eval.bench.rows import Row

CODE = FUSING


def measure(work: Path, arguments: Namespace) -> list[Row]:
    return learned("fuse", work, arguments)
