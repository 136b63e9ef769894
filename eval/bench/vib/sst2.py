"""Classifiers on SST-2: the model that every method begins with, runs on it, curves over sizes.

The MiniLM-L6 encoder of a PyPI wheel (22.7M parameters, 11.9M of them embeddings) is fine-tuned on
SST-2, then 30, 50 and 70 % of all its parameters are removed. Accuracy is that on the 872 sentences
of the validation set. What `full` is compared with fine-tunes with the same loss, rates and batches
for as many steps as `full` takes in all, each of its steps of gates counted twice. Torch-Pruning
draws from all training sentences, the others from 32,768 of them.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compress.eval.bench.options import publish
from compress.eval.bench.rows import Row
from compress.eval.bench.runs import run_once
from compress.eval.bench.vib import command
from compress.eval.bench.vib.outcomes import Outcome, line
from compress.planning.recipe import parse_recipe, read_recipe
from compress.train.options import TrainingOptions

LABEL = "SST-2"
SHARES = (0.5, 0.3, 0.7)  # of all parameters; the first one has the bars
WIDTH_SHARES = (0.2, 0.3, 0.4)  # what heads and neurons reach, which leave embeddings alone
QUALITY = ("evaluation.memory=false", "evaluation.latency=false")
SMALL = ("calibration.samples=64", "evaluation.examples.limit=64")
_FEW = {"steps": 4, "warmup": 0}


def base_model(work: Path, arguments: Namespace) -> Path:
    """Folder of the model that every method begins with."""
    if arguments.base is not None:
        return arguments.base.expanduser().resolve()
    return fine_tuned(work, arguments) / "base"


def fine_tuned(work: Path, arguments: Namespace) -> Path:
    """The run that fine-tunes it."""
    small = (*SMALL, "model.train.training.steps=4") if arguments.smoke else ()
    recipe = read_recipe("classify/minilm-sst2", ["steps=[]", *small])
    return run_once(work, "fine-tune", recipe.to_yaml(), arguments.data_root)


def curve(
    part: str, shares: tuple[float, ...], measured: Callable[[float, int], Outcome],
    work: Path, arguments: Namespace,
) -> list[Row]:  # fmt: skip
    """One method at all sizes, published as each is measured."""
    rows: list[Row] = []
    wanted = [share for share in shares if share in (arguments.share or shares)]
    for share in wanted[:1] if arguments.smoke else wanted:
        outcomes = [measured(share, seed) for seed in range(arguments.seeds)]
        bars = {"lost": 2.0} if (part, share) == ("full", SHARES[0]) else {}
        rows += line(command(part), label(part, share), outcomes, share, **bars)
        publish(arguments, work, rows, "vib", whole=False)
    return rows if wanted == [*shares] else []


def label(part: str, share: float) -> str:
    """How rows of a method at one size begin."""
    return f"{LABEL}, {part.replace('_', '-')} -{round(100 * share)} %"


def run(
    work: Path, name: str, steps: list[dict[str, Any]], seed: int, arguments: Namespace
) -> Path:
    """The run of these steps on the fine-tuned model; all else is the recipe's of `full`."""
    overrides = [f"model={base_model(work, arguments)}", f"seed={seed}", *QUALITY]
    recipe = read_recipe("vtrans/minilm-sst2-full", overrides + [*SMALL] * arguments.smoke)
    changed = recipe.model_dump(mode="json", by_alias=True) | {"steps": steps}
    text = parse_recipe(changed).to_yaml()
    return run_once(work, f"{name}-seed{seed}", text, arguments.data_root)


def of_mode(work: Path, part: str, share: float, seed: int, arguments: Namespace) -> Path:
    """The run of a mode's recipe at one size."""
    base = base_model(work, arguments)
    overrides = [f"model={base}", f"seed={seed}", f"steps.0.share={share}", *QUALITY]
    if arguments.smoke:
        step = read_recipe(f"vtrans/minilm-sst2-{part}").steps[0]
        trained = [name for name in ("training", "fine_tune") if getattr(step, name) is not None]
        overrides += [*SMALL, *(f"steps.0.{name}.steps=4" for name in trained)]
    text = read_recipe(f"vtrans/minilm-sst2-{part}", overrides).to_yaml()
    return run_once(work, f"{part}-{round(100 * share)}-seed{seed}", text, arguments.data_root)


def mode(part: str, work: Path, arguments: Namespace) -> list[Row]:
    """One mode, by its recipe."""

    def measured(share: float, seed: int) -> Outcome:
        return Outcome.of_run(of_mode(work, part, share, seed, arguments))

    return curve(part, SHARES, measured, work, arguments)


def training(arguments: Namespace) -> TrainingOptions:
    """The fine-tuning of what is compared with `full`: as its own, and longer by what the gates
    take, a step of which costs about as much as two of a narrow model."""
    step = read_recipe("vtrans/minilm-sst2-full").steps[0]
    more = {"steps": step.fine_tune.steps + 2 * step.training.steps}
    return step.fine_tune.model_copy(update=_FEW if arguments.smoke else more)
