"""`head_width` and `ffn_width` as they are."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from compress.eval.bench.rows import Row
from compress.eval.bench.vib import SST2
from compress.eval.bench.vib.narrowed import narrowed

CODE = (*SST2, "eval/bench/vib/narrowed.py")


def measure(work: Path, arguments: Namespace) -> list[Row]:
    return narrowed("width", {}, work, arguments)
