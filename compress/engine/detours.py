"""A model without one of its blocks, for each of several: hidden states beside the model's own.

What enters a block is the same with and without it. So a stream that leaves a block out begins in
front of that block, and all of n blocks take about n^2 / 2 runs of a block. One block is in memory;
the streams are in a file.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from torch import nn

from compress.engine.context import StepContext, hidden_file
from compress.linear.casting import computing
from compress.methods.passes import Survey
from compress.models.replay import BlockCall
from compress.system.activations import Activations


class Detours:
    """Hidden states of a model without one of its blocks, made block after block.

    Args:
        stage: the pass that asks for them.
        chosen: blocks that are left out, each by itself.
        hidden: those that enter the next block, [left out][batch] one after the other; None where
            the next block is the first.
        start: index of the next block.
    """

    def __init__(
        self,
        stage: str,
        context: StepContext,
        chosen: Collection[int],
        hidden: Activations | None = None,
        start: int = 0,
    ) -> None:
        self.stage, self.context, self.chosen = stage, context, chosen
        if hidden is None:
            hidden = Activations(detours_file(context, stage, start), checked=True)
        self.hidden = hidden
        self._begun = sorted(index for index in chosen if index < start)
        self._old: list[Activations] = []

    def advance(
        self, index: int, block: nn.Module, calls: list[BlockCall], inputs: Activations
    ) -> None:
        """Run a block on all of them; the one without that block begins behind it.

        Args:
            inputs: what enters the block in the model as it is.
        """
        outputs = Activations(detours_file(self.context, self.stage, index + 1), checked=True)
        device, count = self.context.source.device, len(inputs)
        with torch.no_grad(), computing(block, self.context.compute):
            for number in range(len(self.hidden)):
                states = self.hidden.read(number).to(device)
                outputs.write(number, calls[number % count](block, states))
        if index in self.chosen:
            first = len(self._begun) * count
            for batch in range(count):
                outputs.write(first + batch, inputs.read(batch))
            self._begun.append(index)
        self._old.append(self.hidden)
        self.hidden = outputs

    def states(self) -> dict[int, Iterator[torch.Tensor]]:
        """Block that is left out -> hidden states behind the block that was advanced to last, a
        batch after the other."""
        count = len(self.hidden) // max(1, len(self._begun))
        return {
            index: map(self.hidden.read, range(number * count, (number + 1) * count))
            for number, index in enumerate(self._begun)
        }

    def forget(self) -> None:
        """Delete what is older than the last finished block."""
        for stored in self._old:
            stored.remove()
        self._old = []

    def remove(self) -> None:
        self.forget()
        self.hidden.remove()


def detours_file(context: StepContext, stage: str, index: int) -> Path:
    """Where the hidden states that enter a block by detours are."""
    return hidden_file(context, f"{stage}-detours", index)


def detours_of(step: Survey, stage: str, context: StepContext, start: int) -> Detours | None:
    """What a survey asks for, from the block ``start`` on.

    Raises:
        LostActivations: an interrupted run's file does not hold what it wrote.
    """
    if step.detours is None:
        return None
    chosen = step.detours(context.source.anatomy)
    if not start:
        return Detours(stage, context, chosen)
    carried = context.sink.activations(stage)
    assert carried is not None  # the block before left it
    hidden = Activations.resume(detours_file(context, stage, start), carried["detours"])
    return Detours(stage, context, chosen, hidden, start)
