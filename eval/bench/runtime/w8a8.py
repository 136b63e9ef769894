"""8-bit weights and activations inside transformers, smoothed and not."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from compress.eval.bench.rows import Row
from compress.eval.bench.runtime.inside import CODE, compared

__all__ = ["CODE", "measure"]
STEPS = {"W8A8 smoothed": {"method": "w8a8", "smoothing": 0.5}, "W8A8": {"method": "w8a8"}}


def measure(work: Path, arguments: Namespace) -> list[Row]:
    return compared("w8a8", STEPS, {"prefill": 1.7, "perplexity": 1.02}, work, arguments)
