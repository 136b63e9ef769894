"""MiniLM on SST-2, for the parts `sst2` and `curve`: the fine-tuned model, runs that begin with it,
and how much processor time a step of each way to learn takes."""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path
from statistics import median
from typing import Any

import yaml

import compress
from compress.data.calibration import calibration_batches
from compress.eval.bench.options import say
from compress.eval.bench.runs import remembered, run_once
from compress.eval.report import load_report
from compress.planning.recipe import Recipe, parse_recipe, read_recipe
from compress.system.tensors import TensorIndex

RATIOS = {"2": "200", "2.8": "280", "3.57": "357"}
_FIXED = ("evaluation.memory=false", "evaluation.latency=false")
_SMALL = ("calibration.samples=64", "evaluation.examples.limit=64")
_ROUNDS = 3  # of all learners in turn, when steps are timed
_STEPS = 5, 15  # whose difference is the time of ten: what a step of the recipe takes drops out


def base(work: Path, arguments: Namespace) -> Path:
    """Folder of the fine-tuned model that every method begins with."""
    if arguments.base is not None:
        return arguments.base.expanduser().resolve()
    small = (*_SMALL, "model.train.training.steps=4") if arguments.smoke else ()
    recipe = read_recipe("classify/minilm-sst2", ["steps=[]", *_FIXED, *small])
    return run_once(work, "fine-tune", recipe.to_yaml(), arguments.data_root) / "base"


def shipped(work: Path, ratio: str, arguments: Namespace) -> Recipe:
    """The recipe of a ratio, on the fine-tuned model."""
    overrides = [f"model={base(work, arguments)}", *_FIXED]
    if arguments.smoke:
        overrides += [*_SMALL, "steps.0.rounds=1", "steps.1.training.steps=2"]
        overrides += ["steps.1.training.warmup=0"]
    return read_recipe(f"dsformer/minilm-sst2-{RATIOS[ratio]}", overrides)


def run(work: Path, name: str, recipe: Recipe, arguments: Namespace, **changed: Any) -> Path:
    """The run of a recipe with other fields, by this code."""
    data = yaml.safe_load(recipe.to_yaml()) | changed
    return run_once(work, name, parse_recipe(data).to_yaml(), arguments.data_root)


def accuracy(out: Path) -> float:
    """Of a run's result, percent."""
    return 100 * load_report(out / "report.json").after.labels.scores["accuracy"].value


def encoder_bytes(folder: Path) -> int:
    """Bytes of all tensors in the blocks of a checkpoint, indices among them."""
    index = TensorIndex.open(folder)
    return sum(index.entry(name).nbytes for name in index.names() if ".encoder.layer." in name)


def learners(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Ways to learn after a factorisation, as the step that follows it: STF as the recipe has it,
    the same with supports as they were found, and two low-rank factors in the place of a layer;
    all from the same loss, with as many steps and at the same rate."""
    step = recipe.steps[1].model_dump(mode="json", exclude_defaults=True)
    training, loss = step["training"], step["distillation"]
    return {
        "stf": {"method": "stf", **step},
        "fixed": {"method": "stf", "training": None, "tuning": training, "distillation": loss},
        "low rank": {
            "method": "distill", "scope": "model", "distillation": loss, "training": training,
        },
    }  # fmt: skip


def equal_steps(
    work: Path, learner: str, recipe: Recipe, arguments: Namespace, taught: bool = True
) -> int:
    """Steps of a learner that take as long as those that STF has in a recipe."""
    pace = paces(work, arguments, taught)
    return max(1, round(recipe.steps[1].training.steps * pace["stf"] / pace[learner]))


def paces(work: Path, arguments: Namespace, taught: bool = True) -> dict[str, float]:
    """Processor seconds of a step of each of :func:`learners`; measured once and kept, so that what
    follows from them is the same when a measurement goes on.

    All learn in this process on the same batches, in turn; processor time and the median of rounds,
    since a busy machine stretches the clock of whoever runs.

    Args:
        taught: by the fine-tuned model as well, whose forward is part of a step; without, STF and
            supports as they were found only.
    """
    name = f"paces-{base(work, arguments).name}-{'taught' if taught else 'alone'}"
    return remembered(work / name, lambda: _measured(work, arguments, taught))


def _measured(work: Path, arguments: Namespace, taught: bool) -> dict[str, float]:
    say("how long steps take")
    recipe = shipped(work, "2.8", arguments)
    ratio = recipe.steps[0].ratio
    quick = {"method": "dense_sparse", "ratio": ratio, "rounds": 1, "coding": "correlation",
             "weighting": "plain"}  # fmt: skip
    first = {"stf": quick, "fixed": quick}
    if taught:
        first["low rank"] = {"method": "svd", "ratio": ratio}
    made: dict[str, Any] = {}
    teacher, tokenizer = compress.load(base(work, arguments))
    spec = recipe.calibration.model_copy(update={"samples": 32 * _STEPS[1]})
    found = calibration_batches(spec, tokenizer, teacher.config, data_root=arguments.data_root)
    batches = [{**b, "labels": y} for b, y in zip(found.batches, found.labels, strict=True)]
    for name, step in first.items():
        made[name] = compress.load(base(work, arguments))[0]
        compress.apply(made[name], [step], batches[:1])
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(_ROUNDS):
        for name, model in made.items():
            step = learners(recipe)[name]
            step = step if taught else step | {"distillation": None}
            few, more = (
                _processor_time(model, _shortened(step, count), batches, teacher)
                for count in _STEPS
            )
            seconds[name].append((more - few) / (_STEPS[1] - _STEPS[0]))
    return {name: median(times) for name, times in seconds.items()}


def _shortened(step: dict[str, Any], count: int) -> dict[str, Any]:
    """With so many steps of its training, supports changing in all of them."""
    name = "training" if step["training"] is not None else "tuning"
    short = {**step, name: {**step[name], "steps": count, "warmup": 0}}
    return short | ({"settled": 0.0} if step["method"] == "stf" else {})


def _processor_time(model: Any, step: Any, batches: list[Any], teacher: Any) -> float:
    """Seconds of this process while a live model learns."""
    start = time.process_time()
    compress.apply(model, [step], batches, teacher=teacher)
    return time.process_time() - start
