"""Blocks put side by side and narrowed to one's width, by the shipped recipe."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from compress.eval.bench.depth import FLATTENING
from compress.eval.bench.depth.sizes import sizes
from compress.eval.bench.rows import Row

CODE = FLATTENING


def measure(work: Path, arguments: Namespace) -> list[Row]:
    return sizes("flatten", work, arguments)
