"""How the factors of all layers of a model learn together: their supports first, then without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from compress.linear.dense_sparse import DenseSparseLinear
from compress.methods.factorize.stf_layers import Factors
from compress.train.language import DistillationOptions
from compress.train.loop import TrainingResult
from compress.train.moment import Moment
from compress.train.options import TrainingOptions
from compress.train.teacher import ModelTeacher
from compress.train.whole import ModelWork, learn_language

_POINTS = 40  # of a curve in the journal


def learn_supports(
    work: ModelWork,
    factors: dict[str, Factors],
    vectors: list[nn.Parameter],
    options: TrainingOptions,
    every: int,
    settled: float,
    distillation: DistillationOptions | None,
    teacher: ModelTeacher | None,
) -> None:
    """Train factors with their supports, which are chosen anew every so many steps and stay as
    they are for the last share ``settled`` of them.

    Metrics: ``stf.loss``, the mean of the last tenth of the steps; ``stf.curve``, pairs of seconds
    and mean losses; ``stf.changed``, the share of the non-zeros that have another atom than before.
    """
    before = {name: each.support.clone() for name, each in factors.items()}
    done = -1

    def prepare(moment: Moment) -> float:
        nonlocal done
        if moment.step != done:  # once a step, whatever its micro-batches
            done = moment.step
            with torch.autocast(work.device.type, enabled=False):
                for each in factors.values():
                    each.free = moment.progress < 1 - settled
                    each.choose() if done % every == 0 else each.follow()
        return 0.0

    learned = [parameter for each in factors.values() for parameter in each.learned()]
    held = {f"{n}.{k}": t for n, each in factors.items() for k, t in each.held().items()}
    with _opened([*learned, *vectors]) as chosen:
        result = learn_language(
            work, chosen, options, distillation, name="stf", prepare=prepare, taught_by=teacher,
            held=held,
        )  # fmt: skip
    kept = sum(int((each.support & before[name]).sum()) for name, each in factors.items())
    count = sum(int(support.sum()) for support in before.values())
    work.metrics["stf.changed"] = 1 - kept / count
    _note(work, "stf", result)


def learn_values(
    work: ModelWork,
    layers: list[DenseSparseLinear],
    vectors: list[nn.Parameter],
    options: TrainingOptions,
    distillation: DistillationOptions | None,
    teacher: ModelTeacher | None,
) -> None:
    """Train dictionaries and non-zeros; the supports stay.

    Metrics: ``tuning.loss`` and ``tuning.curve``, as above.
    """
    learned = [t.weight for layer in layers for t in (layer.dictionary, layer.values)]
    with _opened([*learned, *vectors]) as chosen:
        result = learn_language(
            work, chosen, options, distillation, name="tuning", prepare=lambda _moment: 0.0,
            taught_by=teacher,
        )  # fmt: skip
    _note(work, "tuning", result)


def teacher_of(work: ModelWork, distillation: DistillationOptions | None) -> ModelTeacher | None:
    """The model that the recipe began with; None where nothing is learned from it.

    Raises:
        CompressError: there is none.
    """
    return None if distillation is None else work.original(distillation)


@contextmanager
def _opened(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield parameters
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


def _note(work: ModelWork, name: str, result: TrainingResult) -> None:
    work.metrics[f"{name}.loss"] = result.last_loss
    work.metrics[f"{name}.curve"] = curve(result)


def curve(result: TrainingResult, points: int = _POINTS) -> list[tuple[float, float]]:
    """Seconds since a training began and the mean loss of the steps since the point before."""
    lines: list[dict[str, Any]] = result.history
    ends = sorted({round(len(lines) * number / points) for number in range(1, points + 1)} - {0})
    found, start = [], 0
    for end in ends:
        part = lines[start:end]
        found.append((part[-1]["seconds"], sum(line["loss"] for line in part) / len(part)))
        start = end
    return found
