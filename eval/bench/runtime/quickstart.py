"""The shipped quickstart recipe, as ``make quickstart`` runs it."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from compress.eval.bench import quickstart
from compress.eval.bench.rows import Row

CODE = (*quickstart.CODE, "eval/bench/quickstart.py")


def measure(work: Path, arguments: Namespace) -> list[Row]:
    return quickstart.measured(work / "quickstart", arguments.smoke)
