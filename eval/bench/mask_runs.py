"""Runs of the shipped recipes that learn SmolLM2's masks, and what is read off them."""

from __future__ import annotations

import math
from argparse import Namespace
from pathlib import Path

from compress.eval.bench.runs import run_once
from compress.eval.report import load_report
from compress.planning.recipe import read_recipe

FIRST, SEEDS = "smollm2-block", (0, 1, 2)
_SMALL = (
    "calibration.samples=4", "calibration.length=64", "evaluation.max_tokens=1024",
    "evaluation.window=256",
)  # fmt: skip


def shipped(work: Path, name: str, arguments: Namespace, seed: int = 0) -> Path:
    """The run of a shipped SmolLM2 recipe; the later ones start from the masks of the first."""
    training = "training" if name == FIRST else "tuning"
    overrides = [f"seed={seed}"]
    if arguments.smoke:
        overrides += [*_SMALL, f"steps.0.{training}.steps=2"]
    if name != FIRST:
        first = shipped(work, FIRST, arguments, seed)
        overrides.append(f"steps.0.prior={first / 'model' / 'masks.safetensors'}")
    recipe = read_recipe(f"maskllm/{name}", overrides)
    return run_once(work, f"{name}-seed{seed}", recipe.to_yaml(), arguments.data_root)


def one_shot(work: Path, arguments: Namespace) -> Path:
    """SparseGPT's baseline recipe on the same model and text."""
    recipe = read_recipe("baselines/sparsegpt-2of4", list(_SMALL) if arguments.smoke else [])
    return run_once(work, "sparsegpt", recipe.to_yaml(), arguments.data_root)


def perplexities(out: Path) -> tuple[float, float]:
    """Before and after a run's steps."""
    report = load_report(out / "report.json")
    return report.before.perplexity.perplexity, report.after.perplexity.perplexity


def won_back(dense: float, pruned: float, learned: float) -> float:
    """Share of the pruned model's excess log-perplexity that the learned one does not have."""
    return math.log(pruned / learned) / math.log(pruned / dense)
