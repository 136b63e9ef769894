"""The models of masked/ recipes, trained once, and what a benchmark reads off a report on them."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from compress.eval.bench.provenance import code_key
from compress.eval.bench.rows import Row
from compress.eval.bench.runs import run_once
from compress.eval.report import Report, load_report
from compress.planning.recipe import Recipe, parse_recipe, read_recipe

STEPS = 8  # of the sampler, where one number of steps stands for the curve


def run_report(work: Path, name: str, recipe: Recipe, arguments: Namespace) -> Report:
    """Of a run in ``work/name``, carried out unless it is there."""
    out = run_once(work, name, recipe.to_yaml(), arguments.data_root)
    return load_report(out / "report.json")


def row(command: str, figure: str, value: float, **more: Any) -> Row:
    """A row without a bar, unless ``more`` says otherwise."""
    base = {"unit": "", "op": "<=", "bar": None, "peer": None}
    return Row(figure=figure, value=value, command=command, **(base | more))


def judgement(result: Any, steps: int = STEPS) -> Any:
    """The judgement of samples made in so many steps."""
    points = {point.steps: point for point in result.generator.generation.points}
    return points[min(points, key=lambda count: abs(count - steps))].images


def bound(result: Any) -> float:
    """Nats a token."""
    return result.generator.likelihood.nats


def macs(result: Any) -> float:
    """Multiply-accumulates a token at the length of the model's sequences."""
    cost = result.cost.macs
    unused = cost.context - result.generator.likelihood.window
    return cost.per_token - cost.per_token_and_position * unused


def smaller(smoke: bool) -> list[str]:
    """Overrides of a recipe that trains its model."""
    if not smoke:
        return []
    return ["model.train.training.steps=4", "calibration.samples=64",
            "evaluation.generator.samples=20", "evaluation.generator.sequences=16"]  # fmt: skip


def base_model(work: Path, part: str, arguments: Namespace) -> Path:
    """The model that a masked recipe trains, without any step.

    Of a run of the whole recipe by this code, where there is one, so that it is trained once.
    """
    overrides = ["steps=[]", *smaller(arguments.smoke)]
    recipe = read_recipe(f"masked/{part}", overrides)
    for run in sorted(work.glob(f"{part}-{code_key()}-*/")):
        if (run / "base" / "training.json").exists():
            other = read_recipe(run / "recipe.yaml")
            if (other.model, other.seed) == (recipe.model, recipe.seed):
                return run / "base"
    return run_once(work, f"{part}-base", recipe.to_yaml(), arguments.data_root) / "base"


def on_base(
    work: Path, part: str, name: str, steps: list[dict], arguments: Namespace, *overrides: str
) -> Report:
    """Steps on a model that :func:`base_model` has trained."""
    base = base_model(work, part, arguments)
    small = smaller(arguments.smoke)[1:]
    recipe = read_recipe(f"masked/{part}", [f"model={base}", *small, *overrides])
    changed = recipe.model_dump(mode="json", by_alias=True) | {"steps": steps}
    return run_report(work, f"{part}-{name}", parse_recipe(changed), arguments)
