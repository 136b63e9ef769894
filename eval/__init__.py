"""Quality and cost of models, before and after: nothing here imports a compression method.

Names are resolved when first used, so that importing the package costs nothing. ``eval.cost`` and
``eval.compare`` are modules; the functions of those names live in them.
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "EvaluationResult": "eval.spec",
    "EvaluationSpec": "eval.spec",
    "LatencySpec": "eval.spec",
    "MaskedSpec": "eval.spec",
    "Report": "eval.report.schema",
    "evaluate": "eval.evaluator",
    "masked_scores": "eval.quality.masked",
    "paired_latency": "eval.cost.latency",
    "perplexity": "eval.quality.perplexity",
    "run_tasks": "eval.quality.tasks",
    "write_report": "eval.report",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value
