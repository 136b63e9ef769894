"""The masks of a block that did best on held-out batches, of several looks while they learn."""

from __future__ import annotations

from collections.abc import Callable

import torch

from compress.learned_masks import MaskedLinear

_HELD_OUT = 0.05  # share of the calibration batches that only measure
_LOOKS = 4  # at even distances, the end among them


class BestMasks:
    """Measures masks as they are now and remembers the best, a byte a group.

    Learning may end worse than it once was, or than what it came with: a few samples are soon known
    by heart, and a good prior leaves little to gain. What decides is what was not learned from.

    Args:
        linears: of one block.
        measure: the error of their most probable masks on held-out batches.
    """

    def __init__(self, linears: dict[str, MaskedLinear], measure: Callable[[], float]) -> None:
        self.linears, self._measure = linears, measure
        self.first = self.error = measure()
        self._start = self._best = self._now()

    def look(self) -> float:
        """The error of the masks as they are now."""
        error = self._measure()
        if error < self.error:
            self.error, self._best = error, self._now()
        return error

    def restore(self) -> float:
        """Make the best masks the most probable ones; returns the share of groups in which they
        differ from those at the start."""
        changed = groups = 0
        for name, linear in self.linears.items():
            wanted = self._best[name].long()[None]
            logits = linear.logits.detach()
            highest, found = logits.max(0, keepdim=True)
            logits.scatter_(0, found, logits.gather(0, wanted)).scatter_(0, wanted, highest)
            linear.drop()
            changed += int((self._best[name] != self._start[name]).sum())
            groups += wanted.numel()
        return changed / groups

    def _now(self) -> dict[str, torch.Tensor]:
        return {n: m.logits.detach().max(0).indices.byte() for n, m in self.linears.items()}


def looks_at(steps: int) -> set[int]:
    """Before which steps to look; the last look comes after all of them."""
    return {round(steps * number / _LOOKS) for number in range(1, _LOOKS)} - {0, steps}


def split_held_out(count: int) -> tuple[int, list[int]]:
    """How many leading batches are learned from, and those that only measure."""
    held = max(1, round(_HELD_OUT * count)) if count > 1 else 0
    return count - held, list(range(count - held, count)) or [0]
