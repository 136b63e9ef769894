"""Gates, then all weights of the blocks, taught by the uncompressed model."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from compress.eval.bench.rows import Row
from compress.eval.bench.vib import SMOLLM2
from compress.eval.bench.vib.smollm2 import SHORT, measured, recipe_of

CODE = SMOLLM2


def measure(work: Path, arguments: Namespace) -> list[Row]:
    recipe = recipe_of("smollm2-20-distilled", arguments, *SHORT, "steps.1.training.steps=2")
    return measured("smollm2_distilled", "vib, distill", recipe, work, arguments)
