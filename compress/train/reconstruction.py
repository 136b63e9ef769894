"""Blocks learn to return given outputs: what any method does that trains block by block.

The parameters that learn are the method's: logits of masks, kept weights, factors, gates. What is
kept in the end is what did best on batches that nothing was learned from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from compress.models.anatomy import BlockAnatomy
from compress.models.replay import BlockCall
from compress.system.activations import Activations
from compress.train.language import relative_error
from compress.train.loop import fit
from compress.train.moment import Moment
from compress.train.options import Precision, TrainingOptions
from compress.train.source import Indices

_HELD_OUT = 0.05  # share of the calibration batches that only measure
_LOOKS = 4  # at even distances, the end among them

State = TypeVar("State")


@dataclass
class BlockWork:
    """A block, or neighbouring blocks that learn together, as a method gets them.

    Attributes:
        blocks, anatomies: in order, in float32, their parameters not requiring gradients.
        inputs: hidden states that enter the first block, from the compressed blocks in front of it;
            a calibration batch an entry.
        targets: what the last block is to return for them.
        calls: how the model calls each of the blocks, [block][batch].
        device: where the blocks live.
        seed: seed of all random numbers; another one for each block.
        guard: raises when a limit of the run is exceeded.
        precision: what ``precision: auto`` of a training means.
        compute: type of the matrix products in passes without gradients.
        dropped: of blocks that learn together, those that the pass takes from among them, with
            their weights as they were.
        metrics: figures for the journal, set by the method.
    """

    blocks: list[nn.Module]
    anatomies: list[BlockAnatomy]
    inputs: Activations
    targets: Activations
    calls: list[list[BlockCall]]
    device: torch.device
    seed: int
    guard: Callable[[], None] = lambda: None
    precision: Precision = "auto"
    compute: torch.dtype = torch.float32
    dropped: list[nn.Module] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def block(self) -> nn.Module:
        """The block, where it learns by itself."""
        (block,) = self.blocks
        return block

    @property
    def anatomy(self) -> BlockAnatomy:
        """The anatomy of the block, where it learns by itself."""
        (anatomy,) = self.anatomies
        return anatomy


# (output, target, call): how far states [batch, length, hidden size] are from what they should be;
# the call knows which of them are padding.
Distance = Callable[[torch.Tensor, torch.Tensor, BlockCall], torch.Tensor]


def error_of_tokens(output: torch.Tensor, target: torch.Tensor, call: BlockCall) -> torch.Tensor:
    """|y - y'|^2 / |y|^2, averaged over tokens: the next block normalises each token by its length,
    and a plain mean would see only the few tokens of huge norm."""
    return relative_error(call.tokens(output), call.tokens(target))


class BlockOutputs(nn.Module):
    """Blocks, one after the other, and what the last is to return: a module whose forward is the
    mean distance from it over calibration batches."""

    def __init__(self, work: BlockWork, distance: Distance = error_of_tokens) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(work.blocks)
        self._work, self._distance = work, distance

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        work, total = self._work, 0.0
        for index in indices.tolist():
            states = work.inputs.read(index).to(work.device)
            for block, calls in zip(self.blocks, work.calls, strict=True):
                states = calls[index](block, states)
            target = work.targets.read(index).to(work.device)
            total = total + self._distance(states, target, work.calls[-1][index])
        return total / len(indices)


class BestSeen(Generic[State]):
    """Measures what is learned as it is now and remembers the best.

    Learning may end worse than it once was, or than what it came with: a few samples are soon known
    by heart, and a good start leaves little to gain. What decides is what was not learned from.

    Args:
        measure: the error on held-out batches. take: a copy of what is learned.
        steps: of the learning.

    Attributes:
        first: the error at the start. error, state: of the best so far.
        start: what there was at the start. end: the error at the end of learning.
    """

    def __init__(self, measure: Callable[[], float], take: Callable[[], State], steps: int) -> None:
        self._measure, self._take = measure, take
        self._looks = {round(steps * number / _LOOKS) for number in range(1, _LOOKS)} - {0, steps}
        self.first = self.error = self.end = measure()
        self.state = self.start = take()

    def before(self, step: int, micro: int) -> None:
        """Called before a micro-batch is learned from: look, if it is time."""
        if step in self._looks and micro == 0:
            self.look()

    def look(self) -> float:
        """The error as it is now."""
        self.end = self._measure()
        if self.end < self.error:
            self.error, self.state = self.end, self._take()
        return self.end

    def metrics(self, name: str) -> dict[str, float]:
        """Relative errors on held-out batches before learning, at its end, and of what is kept."""
        return {f"{name}.before": self.first, f"{name}.end": self.end, f"{name}.after": self.error}


def learn_outputs(
    work: BlockWork,
    parameters: list[nn.Parameter] | list[dict[str, Any]],
    options: TrainingOptions,
    *,
    prepare: Callable[[Moment], torch.Tensor | float],
    settle: Callable[[], None],
    take: Callable[[], State] | None = None,
    distance: Distance = error_of_tokens,
) -> BestSeen[Any]:
    """Train parameters of blocks, or of modules in them, so that the last returns its targets.

    Args:
        parameters: all of them, or groups as :func:`compress.train.fit` takes them.
        prepare: called before each micro-batch, to make weights of what is learned; returns what
            the loss is less (a reward), or 0.
        settle: makes the blocks what they will be in the end, for measuring.
        take: a copy of what is learned; default: clones of the parameters, the best of which are
            put back afterwards.
        distance: from the targets, which learning makes small.

    Returns:
        What did best on held-out batches; with a ``take`` the caller puts its state back.
    """
    outputs = BlockOutputs(work, distance)
    learned, held = split_held_out(len(work.inputs))

    def measure() -> float:
        """In float32 also while learning computes in 16 bits."""
        settle()
        with torch.no_grad(), torch.autocast(work.device.type, enabled=False):
            return float(outputs(torch.tensor(held)))

    chosen = _parameters(parameters)
    copy = take or (lambda: [p.detach().clone() for p in chosen])
    best: BestSeen[Any] = BestSeen(measure, copy, options.steps)

    def loss(module: nn.Module, batch: dict[str, torch.Tensor], moment: Moment):
        best.before(moment.step, moment.micro)
        reward = prepare(moment)
        error = module(batch["indices"])
        return error - reward, {"error": float(error.detach())}

    fit(
        outputs, loss, Indices(learned), options, parameters=parameters, seed=work.seed,
        guard=work.guard, device=work.device, auto=work.precision,
    )  # fmt: skip
    best.look()
    if take is None:
        with torch.no_grad():
            for parameter, value in zip(chosen, best.state, strict=True):
                parameter.copy_(value)
    return best


def _parameters(given: list[nn.Parameter] | list[dict[str, Any]]) -> list[nn.Parameter]:
    """Parameters, those of groups one after the other."""
    groups = [g["params"] if isinstance(g, dict) else [g] for g in given]
    return [parameter for group in groups for parameter in group]


def split_held_out(count: int) -> tuple[int, list[int]]:
    """How many leading batches are learned from, and those that only measure."""
    held = max(1, round(_HELD_OUT * count)) if count > 1 else 0
    return count - held, list(range(count - held, count)) or [0]
