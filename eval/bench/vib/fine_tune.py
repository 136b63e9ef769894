"""The classifier that every method on SST-2 begins with: its accuracy, and what it took."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from compress.eval.bench.masked_models import row
from compress.eval.bench.rows import Row
from compress.eval.bench.runs import run_once, run_usage
from compress.eval.bench.vib import SST2, command
from compress.eval.bench.vib.outcomes import ACCURACY
from compress.eval.bench.vib.sst2 import LABEL, QUALITY, SMALL, base_model, fine_tuned
from compress.eval.report import load_report
from compress.planning.recipe import read_recipe

CODE = SST2


def measure(work: Path, arguments: Namespace) -> list[Row]:
    """The dense model: its accuracy, and what it took; of a given one the accuracy alone."""
    typed = command("fine_tune")
    if arguments.base is None:
        out = fine_tuned(work, arguments)
    else:
        out, typed = _evaluated(work, arguments), f"{typed} --base DIR"
    dense = load_report(out / "report.json").after
    score = dense.labels.scores["accuracy"]
    low, high = score.interval
    percent: dict[str, Any] = {"unit": "%", "op": ">="}
    rows = [
        row(typed, f"{LABEL}, dense: {ACCURACY}", 100 * score.value, bar=90.0, **percent),
        row(typed, f"{LABEL}, dense: {ACCURACY}, from", 100 * low, **percent),
        row(typed, f"{LABEL}, dense: {ACCURACY}, to", 100 * high, **percent),
    ]
    if arguments.base is None and (usage := run_usage(out)) is not None:
        minutes = usage.cpu_seconds / 60
        rows.append(row(typed, f"{LABEL}, dense: processor time of the whole run", minutes,
                        unit="min", bar=15.0))  # fmt: skip
    return rows


def _evaluated(work: Path, arguments: Namespace) -> Path:
    """The run that only evaluates a fine-tuned model."""
    small = SMALL if arguments.smoke else ()
    overrides = [f"model={base_model(work, arguments)}", "steps=[]", *QUALITY, *small]
    recipe = read_recipe("classify/minilm-sst2", overrides)
    return run_once(work, "dense", recipe.to_yaml(), arguments.data_root)
