"""How gates learn on a whole model: its loss, the price of what passes, the size that is wanted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from compress.methods.width.vib.choosing import Choice, Chooser
from compress.methods.width.vib.gates import Gates
from compress.methods.width.vib.sizes import Sizes
from compress.models.anatomy import Anatomy, anatomy_of
from compress.train.language import DistillationOptions, compared_layers
from compress.train.moment import Moment
from compress.train.teacher import Apart, Batch, Lesson, ModelTeacher


@dataclass(frozen=True)
class Schedule:
    """What is asked of gates while they learn.

    Attributes:
        divergence: price of a nat of KL, averaged over the model's weights.
        warmup: share of the steps in which the wanted size falls from the one at the start to the
            target, linearly.
        sharpness: of the step at log alpha = 0 in the expected size, from start to end, linear.
    """

    divergence: float
    warmup: float
    sharpness: tuple[float, float]

    def sharp(self, moment: Moment) -> float:
        first, last = self.sharpness
        return first + (last - first) * moment.progress

    def wanted(self, moment: Moment, begin: float, target: float) -> float:
        """The share that is to be gone by now."""
        done = min(1.0, moment.progress / self.warmup) if self.warmup else 1.0
        return begin + (target - begin) * done


def counts(gates: Gates, per_unit: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sums over the units of each block: kind -> float64 [blocks]."""
    found = {}
    for kind, values in per_unit.items():
        bounds = gates[kind].bounds
        parts = [values[a:b].double().sum() for a, b in zip(bounds, bounds[1:], strict=False)]
        found[kind] = torch.stack(parts).cpu()  # where sizes are counted
    return found


def expected_gone(gates: Gates, sizes: Sizes, sharpness: float) -> torch.Tensor:
    """The share of the size that is expected to be gone, differentiable in the gates."""
    soft = {kind: gate.soft(sharpness) for kind, gate in gates.kinds.items()}
    return 1 - sizes.amount(counts(gates, soft)) / sizes.whole()


def gone(gates: Gates, sizes: Sizes) -> float:
    """The share that units with more noise than signal make up."""
    hard = {kind: (gate.log_alpha() < 0).detach() for kind, gate in gates.kinds.items()}
    return float(1 - sizes.amount(counts(gates, hard)) / sizes.whole())


def constraint(gates: Gates, gap: torch.Tensor) -> torch.Tensor:
    """lambda1 gap + lambda2 gap^2 of what is gone less what should be; the lambdas climb."""
    first, second = gates.multipliers
    return first * gap + second * gap.square()


def unit_weights(gates: Gates, sizes: Sizes) -> dict[str, torch.Tensor]:
    """What each unit weighs, as a share of the model: kind -> float32 [units]."""
    single, found = sizes.of_one(), {}
    for kind, gate in gates.kinds.items():
        numbers = torch.tensor(gate.bounds).diff()
        shares = (single[kind] / sizes.whole()).float().repeat_interleave(numbers)
        found[kind] = shares.to(gate.mean.device)
    return found


def chooser(
    gates: Gates, sizes: Sizes, target: float, multiples: Mapping[str, int], uniform: bool,
    queries: int,
) -> Chooser:  # fmt: skip
    """What decides on the gates as they are now."""
    scores = {}
    for kind, gate in gates.kinds.items():
        alpha = gate.log_alpha().detach().cpu().double()
        scores[kind] = [gate.of(alpha, block) for block in range(len(gate.bounds) - 1)]
    return Chooser(scores, sizes, target, multiples, uniform, queries)


def keep(gates: Gates, choice: Choice) -> None:
    """Tell the gates what is kept."""
    gates.keep({kind: torch.cat(choice.kept[kind]) for kind in gates.kinds})


Weights = Sequence[tuple[nn.Parameter, torch.Tensor]]


@dataclass(frozen=True)
class OwnTeacher:
    """The model itself as it was, as a teacher: a forward pass more.

    Attributes:
        weights: parameters that have changed since, with the values that they had.
    """

    inner: ModelTeacher
    gates: Gates
    weights: Weights = ()

    @classmethod
    def of(cls, model: nn.Module, gates: Gates, distillation: DistillationOptions) -> OwnTeacher:
        anatomy = anatomy_of(model)
        layers = compared_layers(distillation, len(anatomy.blocks))
        return cls(ModelTeacher(model, anatomy, {i: i for i in layers}), gates)

    def observe(self, batch: Batch) -> Lesson:
        with opened(self.gates, self.weights):
            return _OwnLesson(self.inner.observe(batch), self)


@dataclass(frozen=True)
class _OwnLesson:
    """Its predictions are made when they are asked for: by the model as it was then, too."""

    inner: Lesson
    teacher: OwnTeacher
    layers: Mapping[int, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", self.inner.layers)

    def apart(self, positions: slice, inputs: Batch) -> Apart:
        measure = self.inner.apart(positions, inputs)

        def measured(logits: torch.Tensor, chosen: torch.Tensor, heat: float) -> torch.Tensor:
            with opened(self.teacher.gates, self.teacher.weights):
                return measure(logits, chosen, heat)

        return measured


@contextmanager
def opened(gates: Gates, weights: Weights = ()) -> Iterator[None]:
    """The model without gates and with the weights given; afterwards it is what it was."""
    mode, now = gates.mode, [parameter.data for parameter, _ in weights]
    gates.pass_all()
    for parameter, value in weights:
        parameter.data = value
    try:
        yield
    finally:
        gates.mode = mode
        for (parameter, _), value in zip(weights, now, strict=True):
            parameter.data = value


def weights_now(model: nn.Module, anatomy: Anatomy) -> Weights:
    """The parameters of the blocks' linears with copies of their values."""
    linears = [
        model.get_submodule(f"{block.path}.{name}")
        for block in anatomy.blocks for site in block.sites for name in site.linears
    ]  # fmt: skip
    return [(p, p.detach().clone()) for linear in linears for p in linear.parameters()]
