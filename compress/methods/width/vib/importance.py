"""What each unit is worth before any gate has learned: where gates start from.

At a gate's optimum the noise that the loss allows balances the price of what passes. To second
order the loss grows by H sigma^2 / 2, H the curvature in the gate; with the price b w KL, w the
unit's size, the optimum is sigma^2 = b w / H. So log(w / H) orders the units as trained gates would
be ordered if the loss were quadratic, and gates may as well start there. H is estimated by the
empirical Fisher information, the mean square of the loss's gradient in the gate (Kwon et al. 2022,
arXiv 2204.09656).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch

from compress.methods.width.vib.gates import Gates
from compress.system import processes
from compress.train.options import TrainingOptions
from compress.train.whole import ModelWork, learn_language

_FLOOR = 1e-30
# Of the log alpha that gates start with: beyond these bounds it grows, but slowly, so that gates
# are within reach of the threshold and keep their order.
_LEAST, _MOST, _SLOPE = -9.0, 0.0, 0.02


def fisher(work: ModelWork, gates: Gates, batches: int) -> dict[str, torch.Tensor]:
    """Mean over batches of the squared gradient of the loss in each gate: kind -> [units].

    A training at rate 0, whose gradients are looked at: the model's kind decides the loss. At a
    minimum of the loss the gradients of examples add up like noise, so batches of several order
    the gates as single examples do, and a few examples that the model has wrong decide less.
    """
    world = processes.world().size
    found = {kind: torch.zeros_like(gate.mean) for kind, gate in gates.kinds.items()}
    steps = max(1, min(batches, len(work.batches)) // world)
    rows = len(next(iter(work.batches[0].values())))
    options = TrainingOptions(
        steps=steps, batch=world * rows, micro_batch=rows, learning_rate=1.0, clip=None,
        schedule="constant",
    )  # fmt: skip
    kept = {kind: gate.kept for kind, gate in gates.kinds.items()}
    with _units_at_one(gates), _squared(gates, found):
        means = [gate.mean for gate in gates.kinds.values()]
        learn_language(
            replace(work, folder=None, metrics={}), [{"params": means, "lr": 0.0}], options, None,
            name="importance", prepare=lambda _moment: _harden(gates),
        )  # fmt: skip
    for kind, gate in gates.kinds.items():
        gate.kept = kept[kind]
    if world > 1:
        processes.sum_over_processes(list(found.values()))
    return {kind: value / (steps * world) for kind, value in found.items()}


def _harden(gates: Gates) -> float:
    gates.harden()
    return 0.0


@contextmanager
def _units_at_one(gates: Gates) -> Iterator[None]:
    """All units kept, at a mean of exactly 1: the model as it is, differentiable in its gates."""
    before = {kind: gate.mean.detach().clone() for kind, gate in gates.kinds.items()}
    with torch.no_grad():
        for gate in gates.kinds.values():
            gate.mean.fill_(1.0)
            gate.kept = torch.ones_like(gate.mean, dtype=torch.bool)
    try:
        yield
    finally:
        with torch.no_grad():
            for kind, gate in gates.kinds.items():
                gate.mean.copy_(before[kind])
        gates.pass_all()


@contextmanager
def _squared(gates: Gates, found: dict[str, torch.Tensor]) -> Iterator[None]:
    """Add up the squares of the gradients of all means, one backward pass after the other."""

    def add(kind: str, gradient: torch.Tensor) -> None:
        found[kind] += gradient.detach().square()

    handles = [gate.mean.register_hook(partial(add, kind)) for kind, gate in gates.kinds.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def start(
    gates: Gates,
    importance: dict[str, torch.Tensor],
    weights: dict[str, torch.Tensor],
    share: float,
    margin: float,
    trust: float,
) -> None:
    """Let gates begin in the order that the second order predicts, with a mean of 1.

    Args:
        importance: kind -> H [units].
        weights: kind -> w [units], what a unit weighs.
        share: of the size that is to go: so much of it lies above log alpha = -``margin``.
        trust: factor of the differences: 1 for the optimum itself, 0 for gates that are all alike.
    """
    logs = {k: (weights[k] / importance[k].clamp_min(_FLOOR)).log() for k in importance}
    cut = _quantile(torch.cat(list(logs.values())), torch.cat(list(weights.values())), 1 - share)
    with torch.no_grad():
        for kind, gate in gates.kinds.items():
            gate.mean.fill_(1.0)
            wanted = trust * (logs[kind] - cut) - margin
            inside = wanted.clamp(_LEAST, _MOST)
            gate.log_variance.copy_(inside + _SLOPE * (wanted - inside))


def _quantile(values: torch.Tensor, weights: torch.Tensor, share: float) -> torch.Tensor:
    """The value below which ``share`` of the weight lies."""
    order = values.argsort(stable=True)
    below = weights[order].double().cumsum(0)
    position = int((below < share * below[-1]).sum())
    return values[order[min(position, len(values) - 1)]]
