"""What did best on held-out batches, of several looks while a block learns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from compress.methods.sparsity.maskllm.masks import MaskedLinear

_HELD_OUT = 0.05  # share of the calibration batches that only measure
_LOOKS = 4  # at even distances, the end among them

State = TypeVar("State")


class BestSeen(Generic[State]):
    """Measures what is learned as it is now and remembers the best.

    Learning may end worse than it once was, or than what it came with: a few samples are soon known
    by heart, and a good prior leaves little to gain. What decides is what was not learned from.

    Args:
        measure: the error on held-out batches. take: a copy of what is learned.
        steps: of the learning.

    Attributes:
        first: the error at the start. error, state: of the best so far.
    """

    def __init__(self, measure: Callable[[], float], take: Callable[[], State], steps: int) -> None:
        self._measure, self._take = measure, take
        self._looks = {round(steps * number / _LOOKS) for number in range(1, _LOOKS)} - {0, steps}
        self.first = self.error = measure()
        self.state = take()

    def before(self, step: int, micro: int) -> None:
        """Called before a micro-batch is learned from: look, if it is time."""
        if step in self._looks and micro == 0:
            self.look()

    def look(self) -> float:
        """The error as it is now."""
        error = self._measure()
        if error < self.error:
            self.error, self.state = error, self._take()
        return error


def choices(linears: dict[str, MaskedLinear]) -> dict[str, torch.Tensor]:
    """Which mask of each group is the most probable one, uint8 [G] a linear."""
    return {n: m.logits.detach().max(0).indices.byte() for n, m in linears.items()}


def choose(linears: dict[str, MaskedLinear], wanted: dict[str, torch.Tensor]) -> None:
    """Make these masks the most probable ones."""
    for name, linear in linears.items():
        logits, index = linear.logits.detach(), wanted[name].long()[None]
        highest, found = logits.max(0, keepdim=True)
        logits.scatter_(0, found, logits.gather(0, index)).scatter_(0, index, highest)
        linear.drop()


def split_held_out(count: int) -> tuple[int, list[int]]:
    """How many leading batches are learned from, and those that only measure."""
    held = max(1, round(_HELD_OUT * count)) if count > 1 else 0
    return count - held, list(range(count - held, count)) or [0]
