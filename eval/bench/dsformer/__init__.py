"""Dense-sparse factorisation: what eval/results/dsformer.json holds, a module a part."""

from __future__ import annotations

from typing import Any

from compress.eval.bench.masked_models import row
from compress.eval.bench.provenance import DEFAULT
from compress.eval.bench.rows import Row

# Of everything that `compress run` may execute, what no part of this benchmark does.
CODE = (
    *DEFAULT,
    ":!compress/generators",
    ":!compress/methods/catalog.py",
    ":!compress/methods/depth",
    ":!compress/methods/quantize",
    ":!compress/methods/sparsity",
    ":!compress/methods/width",
    ":!compress/linear/packed.py",
    ":!compress/linear/tinygemm.py",
    ":!compress/runtimes",
)
# Of that, what only learning on the loss of a task takes.
LEARNING = (":!compress/methods/distill", ":!compress/methods/factorize/stf*")


def figure(part: str, name: str, value: float, **more: Any) -> Row:
    """A row of a part."""
    return row(f"python -m compress.eval.bench.dsformer --only {part}", name, value, **more)
