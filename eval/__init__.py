"""Quality and cost of models, before and after: nothing here imports a compression method.

Names are resolved when first used, so that importing the package costs nothing. ``cost`` and
``compare`` are modules; the functions of those names live in them. The folder lies at the top of
the repository and is installed as ``compress.eval``: a top-level package ``eval`` would clash with
the folder of that name in other people's repositories.
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "EvaluationResult": "compress.eval.spec",
    "EvaluationSpec": "compress.eval.spec",
    "LatencySpec": "compress.eval.spec",
    "MaskedSpec": "compress.eval.spec",
    "Report": "compress.eval.report.schema",
    "evaluate": "compress.eval.evaluator",
    "masked_scores": "compress.eval.quality.masked",
    "paired_latency": "compress.eval.cost.latency",
    "perplexity": "compress.eval.quality.perplexity",
    "run_tasks": "compress.eval.quality.tasks",
    "write_report": "compress.eval.report",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value
