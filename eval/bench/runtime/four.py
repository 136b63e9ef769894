"""4-bit linears inside transformers, with embeddings of 8 bits and with embeddings as they are."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from compress.eval.bench.rows import Row
from compress.eval.bench.runtime.inside import CODE, FOUR, compared

__all__ = ["CODE", "measure"]


def measure(work: Path, arguments: Namespace) -> list[Row]:
    return compared("four", FOUR, {"decode": 1.5, "memory": 0.35}, work, arguments)
