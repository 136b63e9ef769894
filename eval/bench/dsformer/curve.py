"""The loss of MiniLM on SST-2 while it learns at 2.8 times smaller: with supports that learn (STF)
and with those that the factorisation has found, from the same model for the same time."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.eval.bench import dsformer
from compress.eval.bench.drawings import page
from compress.eval.bench.dsformer import figure
from compress.eval.bench.dsformer.minilm import (
    accuracy,
    equal_steps,
    learners,
    paces,
    run,
    shipped,
)
from compress.eval.bench.provenance import ROOT
from compress.eval.bench.rows import Row, number
from compress.eval.bench.runs import journal
from compress.eval.report.plot import Point, curves

CODE = (*dsformer.CODE, "recipes/dsformer/minilm-sst2*", "eval/bench/dsformer/minilm.py")
_RATIO = "2.8"
_NAMES = {"stf": "supports that learn", "fixed": "supports as they were found"}


def measure(work: Path, arguments: Namespace) -> list[Row]:
    recipe = shipped(work, _RATIO, arguments)
    steps = [step.model_dump(mode="json", exclude_defaults=True) for step in recipe.steps]
    first = {"method": recipe.steps[0].name, **steps[0]}
    begun = run(work, "curve-begun", recipe, arguments, steps=[first]) / "model"
    pace, lines, rows = paces(work, arguments, taught=False), {}, []
    ends = {}
    for name in _NAMES:
        learn = learners(recipe)[name]
        learn["distillation"] = None  # the model that it begins with would teach
        training = "training" if name == "stf" else "tuning"
        count = equal_steps(work, name, recipe, arguments, taught=False)
        learn[training] = {**learn[training], "steps": count}
        out = run(work, f"curve-{name}", recipe, arguments, model=str(begun), steps=[learn])
        noted = "stf" if name == "stf" else "tuning"
        lines[name] = _curve(_noted(out, f"{noted}.curve"), count * pace[name] / 60)
        ends[name] = _noted(out, f"{noted}.loss")
        label = f"SST-2, {_NAMES[name]}"
        rows += [
            figure("curve", f"{label}: loss of the last steps", ends[name], unit="nats"),
            figure("curve", f"{label}: accuracy", accuracy(out), unit="%", op=">="),
        ]
    rows += [
        figure("curve", "SST-2, supports that learn: loss of the last steps / as they were found",
               ends["stf"] / ends["fixed"], bar=1.0),
        figure("curve", "SST-2, supports that learn: time of a step / as they were found",
               pace["stf"] / pace["fixed"]),
    ]  # fmt: skip
    folder = work if arguments.smoke else ROOT / "docs" / "images"
    (folder / "dsformer-loss.svg").write_text(_drawn(lines), encoding="utf-8")
    return rows


def _curve(points: Sequence[Any], minutes: float) -> list[tuple[float, float]]:
    """Minutes of one processor, and the loss by then: steps at the pace at which both were
    measured together, for the clock of a run is that of whatever else the machine did."""
    count = len(points)
    return [(minutes * at / count, loss) for at, (_seconds, loss) in enumerate(points, 1)]


def _noted(out: Path, name: str) -> Any:
    """What a step has noted of its learning."""
    notes = (note for event in journal(out) for note in event.values() if isinstance(note, dict))
    return next(note[name] for note in notes if name in note)


def _drawn(lines: dict[str, list[tuple[float, float]]]) -> str:
    named = [
        (_NAMES[name], "frontier" if name == "stf" else "other",
         [Point(_NAMES[name], at, loss) for at, loss in line])
        for name, line in lines.items()
    ]  # fmt: skip
    return page(curves(named, "minutes of one processor", "loss, nats", number, number))
