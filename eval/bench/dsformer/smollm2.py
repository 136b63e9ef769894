"""Perplexity of SmolLM2 on WikiText-2 at two sizes, before and after each block was tuned to the
dense one's outputs (the shipped recipes), and SVD-LLM's at the same bytes."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from compress.eval.bench import dsformer
from compress.eval.bench.dsformer import LEARNING, figure
from compress.eval.bench.mask_runs import perplexities
from compress.eval.bench.options import publish
from compress.eval.bench.rows import Row
from compress.eval.bench.runs import run_once, step_peak, step_seconds
from compress.planning.recipe import read_recipe

CODE = (*dsformer.CODE, *LEARNING, "recipes/dsformer/smollm2*")
RATIOS = {"1.25": "125", "1.5": "150"}
_SMALL = (
    "calibration.samples=4", "calibration.length=64", "evaluation.max_tokens=1024",
    "evaluation.window=256",
)  # fmt: skip


def measure(work: Path, arguments: Namespace) -> list[Row]:
    rows: list[Row] = []

    def note(name: str, value: float, **more) -> None:
        """A row, published at once: a part takes hours."""
        made = figure("smollm2", name, value, **more)
        if made.figure not in {line.figure for line in rows}:
            rows.append(made)
        publish(arguments, work, rows, "dsformer", whole=False)

    for ratio in RATIOS:
        label = f"SmolLM2, block linears {ratio} x smaller"
        theirs = perplexities(run(work, ratio, "svd_llm", arguments))[1]
        note(f"{label}, SVD-LLM: perplexity", theirs)
        out = run(work, ratio, "plain", arguments)
        dense, plain = perplexities(out)
        note("SmolLM2, dense: perplexity", dense)
        note(f"{label}, dense_sparse: perplexity", plain)
        note(f"{label}: perplexity, dense_sparse / SVD-LLM", plain / theirs, bar=0.6)
        note(f"{label}, dense_sparse: time", step_seconds(out) / 60, unit="min")
    for ratio in RATIOS:
        label, first = f"SmolLM2, block linears {ratio} x smaller, blocks tuned", ratio == "1.25"
        out = run(work, ratio, "refined", arguments)
        dense, tuned = perplexities(out)
        note(f"{label}: perplexity", tuned)
        note(f"{label}: perplexity / dense", tuned / dense, bar=1.6 if first else None)
        note(f"{label}: time", step_seconds(out) / 3600, unit="h", bar=1.0 if first else None)
        note(f"{label}: peak memory", step_peak(out) / 1e9, unit="GB")
    return rows


def run(work: Path, ratio: str, kind: str, arguments: Namespace) -> Path:
    """The run of a shipped recipe, as it is, without tuning, or with SVD-LLM at its bytes."""
    overrides = list(_SMALL) if arguments.smoke else []
    recipe = read_recipe(f"dsformer/smollm2-{RATIOS[ratio]}", overrides)
    step = recipe.steps[0].model_dump(exclude_defaults=True)
    if kind == "refined":
        if arguments.smoke:
            overrides.append("steps.0.refine.steps=2")
    elif kind == "plain":
        overrides.append("steps.0.refine=null")
    else:
        overrides.append(f"steps=[{{method: svd_llm, ratio: {step['ratio']}}}]")
    recipe = read_recipe(f"dsformer/smollm2-{RATIOS[ratio]}", overrides)
    return run_once(work, f"{kind}-{RATIOS[ratio]}", recipe.to_yaml(), arguments.data_root)
