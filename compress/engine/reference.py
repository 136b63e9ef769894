"""What blocks that learn are to reproduce: hidden states of another model, streamed beside theirs.

A block that learns by itself is given inputs and targets. Its inputs come from the compressed
blocks in front of it; its targets, by default, from the model that enters the step, so that a block
also makes up for the errors of those before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.engine.context import StepContext, hidden_file
from compress.linear.casting import computing
from compress.methods.passes import Stream
from compress.models.calls import capture_inputs
from compress.models.replay import BlockCall
from compress.system.activations import Activations

Calls = list[list[BlockCall]]  # how a model calls its blocks: [block][batch]


class Reference:
    """Hidden states of a reference model, made block after block.

    Args:
        stage: the pass that asks for them.
        ranges: for each block of the result, the reference's blocks (first, end) that it stands
            for: its targets are what leaves the last of them.
        calls: how the reference calls its blocks.
        open_block: gives a block of the reference that is not in memory, with its weights.
        own: hidden states that enter the next block of the reference, where it has a stream of its
            own; None where each block's targets follow from the compressed inputs (``prefix``).
    """

    def __init__(
        self,
        stage: str,
        context: StepContext,
        ranges: list[tuple[int, int]],
        calls: Calls,
        open_block: Callable[[int], AbstractContextManager[nn.Module]],
        own: Activations | None,
    ) -> None:
        self.stage, self.context, self.ranges, self.calls = stage, context, ranges, calls
        self._open, self._own = open_block, own
        self._targets: Activations | None = None
        self._old: list[Activations] = []

    @property
    def targets(self) -> Activations:
        """What the block that was advanced to last is to return."""
        assert self._targets is not None  # of a block, after advance
        return self._targets

    def advance(self, span: list[int], here: dict[int, nn.Module], compressed: Activations) -> None:
        """Make the targets of neighbouring blocks of the result: what the last is to return.

        Args:
            span: their indices; mostly it is one.
            here: blocks of the reference that are in memory anyway, as yet unchanged.
            compressed: what enters the first of them.
        """
        hidden = compressed if self._own is None else self._own
        if self._own is None and self._targets is not None:
            self._old.append(self._targets)
        for position in range(self.ranges[span[0]][0], self.ranges[span[-1]][1]):
            outputs = Activations(
                reference_file(self.context, self.stage, position + 1), checked=True
            )
            with self._block(position, here) as block:
                self._run(block, self.calls[position], hidden, outputs)
            if hidden is not compressed:
                self._old.append(hidden)
            hidden = outputs
        self._targets = hidden
        if self._own is not None:
            self._own = hidden

    def leave(self, span: list[int], here: dict[int, nn.Module], compressed: Activations) -> None:
        """Come past blocks that do not learn, as :meth:`advance`; only a stream of its own goes on
        behind them."""
        if self._own is not None:
            self.advance(span, here, compressed)

    def _run(
        self, block: nn.Module, calls: list[BlockCall], inputs: Activations, outputs: Activations
    ) -> None:
        device = self.context.source.device
        with torch.no_grad(), computing(block, self.context.compute):
            for batch in range(len(inputs)):
                outputs.write(batch, calls[batch](block, inputs.read(batch).to(device)))

    @contextmanager
    def _block(self, position: int, here: dict[int, nn.Module]) -> Iterator[nn.Module]:
        if position in here:
            yield here[position]
            return
        with self._open(position) as block:
            yield block

    def state(self) -> dict[str, Any] | None:
        """What the next block starts from; None where its targets follow from its inputs."""
        return None if self._own is None else self._own.state()

    def forget(self) -> None:
        """Delete what is older than the targets of a finished block."""
        for stored in self._old:
            stored.remove()
        self._old = []

    def remove(self) -> None:
        self.forget()
        if self._targets is not None:
            self._targets.remove()


def reference_file(context: StepContext, stage: str, index: int) -> Path:
    """Where the hidden states that enter a block of the reference are."""
    return hidden_file(context, f"{stage}-reference", index)


def reference_of(
    step: Stream,
    stage: str,
    context: StepContext,
    ranges: list[tuple[int, int]],
    start: int,
    calls: Calls,
    dense: Activations | None,
) -> Reference:
    """What the blocks from ``start`` on are to return.

    Args:
        ranges: blocks (first, end) of the model that enters the pass, for each of the result.
        calls: of the model that enters the pass.
        dense: the hidden states that enter its first block.

    Raises:
        LostActivations: an interrupted run's file does not hold what it wrote.
    """
    if step.targets == "original":
        return _of_original(step, stage, context, ranges, start)
    if step.targets == "prefix":
        return Reference(stage, context, ranges, calls, _opener(context), None)
    own = _carried(stage, context, ranges, start) if start else dense
    return Reference(stage, context, ranges, calls, _opener(context), own)


def _of_original(
    step: Stream, stage: str, context: StepContext, ranges: list[tuple[int, int]], start: int
) -> Reference:
    original, origins = context.original, context.sink.origins()
    assert original is not None and origins  # whoever runs a step that asks for it gives them
    source = original.source
    first = Activations(reference_file(context, stage, 0))
    source.fill_outer()
    batches = [
        {k: v.to(source.device) for k, v in batch.items()}
        for batch in context.batches[: step.batches]
    ]
    calls = capture_inputs(source.model, source.anatomy, batches, first)
    source.release_outer()
    ranges = [(origins[begin][0], origins[end - 1][1]) for begin, end in ranges]
    own = first
    if start:
        first.remove()
        own = _carried(stage, context, ranges, start)
    return Reference(stage, context, ranges, calls, original.block, own)


def _carried(
    stage: str, context: StepContext, ranges: list[tuple[int, int]], start: int
) -> Activations:
    carried = context.sink.activations(stage)
    assert carried is not None  # the block before left it
    file = reference_file(context, stage, ranges[start][0])
    return Activations.resume(file, carried["reference"])


def _opener(context: StepContext) -> Callable[[int], AbstractContextManager[nn.Module]]:
    """Blocks of the model that enters the pass."""
    source, sink = context.source, context.sink

    @contextmanager
    def opened(index: int) -> Iterator[nn.Module]:
        block = source.block(index)
        sink.load(index, block)
        try:
            yield block.to(source.device)
        finally:
            source.release_block(index)

    return opened
