"""Pass over the blocks of a model, one (or a group that becomes one) in memory at a time.

The same code serves a checkpoint on disk (each finished block is handed to a sink that makes it
durable) and a live model (blocks change in place).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from compress.engine.blocks import BlockHere, act, look
from compress.engine.context import StepContext, hidden_file
from compress.engine.learning import frozen
from compress.engine.reference import Calls, Reference, reference_file, reference_of
from compress.errors import CompressError
from compress.methods.passes import Stream, Survey
from compress.methods.work import GroupWork, OuterWork
from compress.models.anatomy import block_anatomy
from compress.models.groups import Groups, covered
from compress.models.replay import BlockReplay
from compress.models.stream import StreamedModel, capture_inputs
from compress.system.activations import Activations, LostActivations


class Streaming:
    """One pass over all blocks behind the last finished one.

    Args:
        stage: of the pass. name: of the method, for messages.
        decision: of an earlier pass of the step.
        groups: the blocks that each block of the result is made from.
    """

    def __init__(
        self,
        step: Survey | Stream,
        stage: str,
        name: str,
        context: StepContext,
        decision: Any,
        groups: Groups,
    ) -> None:
        self.step, self.stage, self.name = step, stage, name
        self.context, self.decision, self.groups = context, decision, groups
        count = len(context.source.anatomy.blocks)
        self.ranges = covered(groups, count)
        chosen = range(len(groups))
        if isinstance(step, Stream) and step.only is not None:
            chosen = sorted(set(step.only(decision, context.source.anatomy)))
        self.worked, self.end = set(chosen), 1 + max(chosen, default=-1)
        if any(len(g) > 1 and i not in self.worked for i, g in enumerate(groups)):
            raise CompressError("groups of several blocks among those worked on", repr(groups))
        self.hidden: Activations | None = None
        self.calls: Calls = [[] for _ in range(count)]
        self.reference: Reference | None = None
        self._cores: dict[str, Any] = {}  # see BlockReplay

    def run(self) -> None:
        """Do what is left of the pass.

        Raises:
            CompressError: naming the block at which it happened.
        """
        context, sink, count = self.context, self.context.sink, len(self.groups)
        start = sink.finished(self.stage)
        if start == count:
            return
        try:
            if start < self.end:
                self._begin(start)
        except LostActivations as lost:
            sink.again(self.stage, f"{lost.got}, so {self.name} starts its {self.stage} pass anew")
            self.run()
            return
        for index in range(start, count):
            context.guard()
            entered = self.hidden
            note = {} if index >= self.end else self._block(index)
            carried = None
            if self.hidden is not None and index < self.end:
                carried = self.hidden.state()
                if self.reference is not None:
                    carried |= {"reference": self.reference.state()}
            sink.record(self.stage, index, note, carried)
            # Only now is what entered the block of no use to anybody.
            if entered is not None and entered is not self.hidden:
                entered.remove()
            if self.reference is not None:
                self.reference.forget()
            context.report(self.stage, index, count, note)
        for stored in (self.hidden, self.reference):
            if stored is not None:
                stored.remove()

    def _begin(self, start: int) -> None:
        """Inputs of the block that comes first, how each block is called, and what it is to return.

        Raises:
            LostActivations: an interrupted run's file does not hold what it wrote.
        """
        step, context = self.step, self.context
        outer = step.outer if isinstance(step, Stream) else None
        learns = isinstance(step, Stream) and bool(step.learning)
        streams = isinstance(step, Survey) or step.inputs
        dense, calls = None, None
        if outer is not None and learns and step.targets == "dense":
            # The reference sees what lies outside the blocks as it was.
            dense = Activations(reference_file(context, self.stage, 0))
            calls = self._capture(context.source, dense)
        source = context.source if outer is None else self._changed_outer(outer)
        if not streams:
            return
        hidden = Activations(hidden_file(context, self.stage, 0))
        self.calls = self._capture(source, hidden)
        self.hidden = hidden
        if start > 0:
            for stored in filter(None, (hidden, dense)):
                stored.remove()
            carried = context.sink.activations(self.stage)
            assert carried is not None  # the block before left it
            self.hidden = Activations.resume(hidden_file(context, self.stage, start), carried)
        if isinstance(step, Stream) and learns:
            self.reference = reference_of(
                step, self.stage, context, self.ranges, start, calls or self.calls, dense or hidden
            )

    def _capture(self, source: StreamedModel, hidden: Activations) -> Calls:
        """Embed the batches; the hidden states that enter the first block, and all calls."""
        limit = self.step.batches if isinstance(self.step, Stream) else None
        source.fill_outer()
        batches = [
            {k: v.to(source.device) for k, v in batch.items()}
            for batch in self.context.batches[:limit]
        ]
        calls = capture_inputs(source.model, source.anatomy, batches, hidden)
        source.release_outer()
        return calls

    def _changed_outer(self, change: Any) -> StreamedModel:
        """The model with what lies outside its blocks as the pass makes it."""
        context, source = self.context, self.context.source
        learned = context.learned.outside() if context.learned is not None else {}
        if not source.live:
            # A copy, since shapes may change, and what enters the pass may be asked for again.
            source = StreamedModel(copy.deepcopy(source.model), source.tensors, source.device)
        source.fill_outer()
        context.sink.touch_outer(source.model)
        with torch.no_grad():
            change(OuterWork(source.model, context.source.anatomy, self.decision, learned))
        context.sink.store_outer(self.stage, source.model)
        return source

    def _block(self, index: int) -> Any:
        """Work on one block of the result; returns the note for the journal."""
        group = self.groups[index]
        try:
            with self._filled(group):
                if index not in self.worked:
                    return self._leave(index)
                return self._work(index)
        except CompressError as error:
            raise error.within(f"step {self.name}, block {group[0]}") from error

    @contextmanager
    def _filled(self, group: list[int]) -> Iterator[None]:
        source = self.context.source
        try:
            for position in group:
                block = source.block(position)
                self.context.sink.load(position, block)
                block.to(source.device)
            yield
        finally:
            for position in group:
                source.release_block(position)

    def _leave(self, index: int) -> dict[str, float]:
        """Run a block that stays as it is."""
        here = self._here(index)
        self._target(index)
        self._advance(here)
        return {}

    def _target(self, index: int) -> None:
        """Make the targets of a block while it is what it was."""
        if self.reference is not None and self.hidden is not None:
            blocks = {p: self.context.source.block(p) for p in self.groups[index]}
            # The original's blocks are others.
            here = (
                blocks if isinstance(self.step, Stream) and self.step.targets != "original" else {}
            )
            self.reference.advance(index, here, self.hidden)

    def _work(self, index: int) -> Any:
        step, context = self.step, self.context
        if isinstance(step, Survey):
            here = self._here(index)
            outputs = self._outputs(index)
            note = look(step, self.stage, context, here, outputs)
            self.hidden = outputs
            return note
        self._target(index)
        figures = self._merge(index) if len(self.groups[index]) > 1 else {}
        here = self._here(index)
        # What learns adds parameters of its own; all other steps touch no gradients.
        with frozen(here.block) if step.settle or step.keep else nullcontext():
            figures |= act(step, context, here, self.decision)
            if step.keep is None:
                if step.settle is not None:
                    step.settle(here.block)
                anatomy, config = here.anatomy, context.source.model.config
                final = block_anatomy(here.block, anatomy.path, index, config, anatomy.family)
                context.sink.store(self.stage, index, here.block, final)
            self._advance(here)
            if step.keep is not None:
                context.sink.keep(self.stage, index, step.keep(here.block))
        return figures

    def _merge(self, index: int) -> dict[str, float]:
        """Put one block in the place of a group."""
        source, group = self.context.source, self.groups[index]
        assert isinstance(self.step, Stream)
        if self.step.merge is None:
            raise CompressError("a function `merge` beside groups of several blocks", "none")
        work = GroupWork(
            [source.block(p) for p in group],
            [source.anatomy.blocks[p] for p in group],
            source.model.config, self.hidden, [self.calls[p] for p in group], source.device,
            self.decision, [self._learned(p) for p in group],
        )  # fmt: skip
        with torch.no_grad():
            merged = self.step.merge(work)
        source.model.set_submodule(source.anatomy.blocks[group[0]].path, merged)
        return dict(work.metrics)

    def _here(self, index: int) -> BlockHere:
        """A block of the result and all that goes with it."""
        source, group = self.context.source, self.groups[index]
        anatomy, block = source.anatomy.blocks[group[0]], source.block(group[0])
        if len(group) > 1:
            config = source.model.config
            anatomy = block_anatomy(block, anatomy.path, group[0], config, anatomy.family)
        replay = None
        if self.hidden is not None:
            replay = BlockReplay(
                block, anatomy, self.hidden, self.calls[group[0]], self.context.scratch,
                source.device, self._cores, self.context.compute,
            )  # fmt: skip
        learned = self._learned(group[0]) if len(group) == 1 else {}
        return BlockHere(index, block, anatomy, replay, self.reference, learned)

    def _learned(self, position: int) -> dict[str, torch.Tensor]:
        learned = self.context.learned
        return {} if learned is None else learned.block(position)

    def _advance(self, here: BlockHere) -> None:
        """Run a block as it is now; its outputs are the next block's inputs."""
        if here.replay is not None:
            outputs = self._outputs(here.index)
            here.replay.finish(outputs.write)
            self.hidden = outputs

    def _outputs(self, index: int) -> Activations:
        return Activations(hidden_file(self.context, self.stage, index + 1), checked=True)
