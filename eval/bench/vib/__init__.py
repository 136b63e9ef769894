"""Learned widths (`vib`): what eval/results/vib.json holds, a module a part."""

from __future__ import annotations

from typing import Any

from compress.eval.bench.masked_models import row
from compress.eval.bench.provenance import DEFAULT
from compress.eval.bench.rows import Row

# Of everything that `compress run` may execute, what no part of this benchmark does.
CODE = (
    *DEFAULT, "recipes/vtrans", ":!compress/generators", ":!compress/methods/quantize",
    ":!compress/methods/sparsity", ":!compress/methods/factorize", ":!compress/methods/depth",
    ":!compress/linear/packed.py", ":!compress/linear/tinygemm.py", ":!compress/runtimes",
)  # fmt: skip
SST2 = (*CODE, "recipes/classify", "eval/bench/vib/sst2.py", "eval/bench/vib/outcomes.py")
SMOLLM2 = (*CODE, "eval/bench/vib/smollm2.py")


def figure(part: str, name: str, value: float, **more: Any) -> Row:
    """A row of a part."""
    return row(command(part), name, value, **more)


def command(part: str) -> str:
    return f"python -m compress.eval.bench.vib --only {part}"
