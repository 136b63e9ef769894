"""A fifth of SmolLM2's block parameters: the gates' start, the fit, the means. No weight learns."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from compress.eval.bench.rows import Row
from compress.eval.bench.vib import SMOLLM2
from compress.eval.bench.vib.smollm2 import SHORT, measured, recipe_of

CODE = SMOLLM2


def measure(work: Path, arguments: Namespace) -> list[Row]:
    recipe = recipe_of("smollm2-20", arguments, *SHORT)
    return measured("smollm2_gates", "vib", recipe, work, arguments, hours=1.0)
