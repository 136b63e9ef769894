"""Pass over the blocks of a model, one in memory at a time; or a group that becomes one, or a span
of blocks that learn together.

The same code serves a checkpoint on disk (each finished block is handed to a sink that makes it
durable) and a live model (blocks change in place).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from compress.engine.blocks import BlockHere, SpanHere, act, look
from compress.engine.context import StepContext, hidden_file
from compress.engine.detours import Detours, detours_of
from compress.engine.learning import frozen
from compress.engine.reference import Calls, Reference, reference_file, reference_of
from compress.engine.spans import spans_of
from compress.errors import CompressError
from compress.methods.passes import Stream, Survey
from compress.methods.work import GroupWork, OuterWork
from compress.models.anatomy import block_anatomy
from compress.models.calls import capture_inputs
from compress.models.groups import Groups, covered
from compress.models.halves import head_input
from compress.models.replay import BlockReplay, Handed
from compress.models.stream import StreamedModel
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
        self.spans, self.learning_together = spans_of([], groups, self.ranges, (), 1), set[int]()
        if isinstance(step, Stream) and step.spans is not None:
            asked = step.spans(decision, context.source.anatomy)
            self.spans = spans_of(asked, groups, self.ranges, self.worked, step.most)
            self.learning_together = {span[0] for span in asked}
        self.hidden: Activations | None = None
        self.calls: Calls = [[] for _ in range(count)]
        self.reference: Reference | None = None
        self.detours: Detours | None = None
        self._handed = Handed(context.scratch)

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
        for span in self.spans:
            if span[0] < start:
                continue
            context.guard()
            entered = self.hidden
            note = {} if span[0] >= self.end else self._span(span)
            if span[-1] + 1 == count and isinstance(self.step, Stream) and self.step.closing:
                # Before the last block is recorded: what is recorded is not done again.
                self._changed_outer(self.step.closing, self._head_inputs)
            carried = None
            if self.hidden is not None and self.hidden is not entered:
                carried = self.hidden.state()
                reference = None if self.reference is None else self.reference.state()
                if reference is not None:
                    carried |= {"reference": reference}
                if self.detours is not None:
                    carried |= {"detours": self.detours.hidden.state()}
            sink.record(self.stage, span[0], note, carried, len(span))
            # Only now is what entered the blocks of no use to anybody.
            if entered is not None and entered is not self.hidden:
                entered.remove()
            for beside in filter(None, (self.reference, self.detours)):
                beside.forget()
            context.report(self.stage, span[-1], count, note)
        for stored in (self.hidden, self.reference, self.detours, self._handed):
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
        if isinstance(step, Survey):
            self.detours = detours_of(step, self.stage, context, start)
        if isinstance(step, Stream) and learns:
            self.reference = reference_of(
                step, self.stage, context, self.ranges, start, calls or self.calls, dense or hidden
            )

    def _capture(self, source: StreamedModel, hidden: Activations) -> Calls:
        """Embed the batches; the hidden states that enter the first block, and all calls."""
        limit = self.step.batches
        source.fill_outer()
        batches = [
            {k: v.to(source.device) for k, v in batch.items()}
            for batch in self.context.batches[:limit]
        ]
        calls = capture_inputs(source.model, source.anatomy, batches, hidden)
        source.release_outer()
        return calls

    def _head_inputs(self, model: PreTrainedModel) -> Iterator[torch.Tensor]:
        """See :class:`OuterWork`."""
        context, anatomy = self.context, self.context.source.anatomy
        for index in range(0 if self.hidden is None else len(self.hidden)):
            context.guard()
            batch = {k: v.to(context.source.device) for k, v in context.batches[index].items()}
            states = self.hidden.read(index).to(context.source.device)
            entering = head_input(model, anatomy, batch, states)
            if entering is None:
                return
            yield self.calls[-1][index].tokens(entering).flatten(0, -2)

    def _changed_outer(
        self,
        change: Callable[[OuterWork], None],
        head_inputs: Callable[[PreTrainedModel], Iterator[torch.Tensor]] | None = None,
    ) -> StreamedModel:
        """The model with what lies outside its blocks as the pass makes it."""
        context, source = self.context, self.context.source
        learned = context.learned.outside() if context.learned is not None else {}
        if not source.live:
            # A copy, since shapes may change, and what enters the pass may be asked for again.
            source = StreamedModel(copy.deepcopy(source.model), source.tensors, source.device)
        source.fill_outer()
        context.sink.touch_outer(source.model)
        work = OuterWork(
            source.model, context.source.anatomy, self.decision, learned, context.storage_dtype
        )
        if head_inputs is not None:
            work.head_inputs = partial(head_inputs, source.model)
        with torch.no_grad():
            change(work)
        context.sink.store_outer(self.stage, source.model)
        return source

    def _span(self, span: list[int]) -> Any:
        """Work on blocks of the result, mostly one; returns the note for the journal."""
        kept = [position for index in span for position in self.groups[index]]
        dropped = []
        if span[0] in self.learning_together:
            first, end = self.ranges[span[0]][0], self.ranges[span[-1]][1]
            dropped = [position for position in range(first, end) if position not in kept]
        try:
            with self._filled(sorted(kept + dropped)):
                if span[0] not in self.worked:
                    return self._leave(span)
                return self._work(span, dropped)
        except CompressError as error:
            raise error.within(f"step {self.name}, block {kept[0]}") from error

    @contextmanager
    def _filled(self, positions: list[int]) -> Iterator[None]:
        source = self.context.source
        try:
            for position in positions:
                block = source.block(position)
                self.context.sink.load(position, block)
                block.to(source.device)
            yield
        finally:
            for position in positions:
                source.release_block(position)

    def _leave(self, span: list[int]) -> dict[str, float]:
        """Run a block that stays as it is."""
        here = self._here(span)
        if self.reference is not None and self.hidden is not None:
            self.reference.leave(span, self._old_blocks(span), self.hidden)
        self._advance(here)
        return {}

    def _old_blocks(self, span: list[int], dropped: Iterable[int] = ()) -> dict[int, nn.Module]:
        """Blocks of the model that enters the pass which are in memory, as yet unchanged, where its
        outputs are the targets."""
        if isinstance(self.step, Stream) and self.step.targets == "original":
            return {}
        positions = [position for index in span for position in self.groups[index]]
        return {p: self.context.source.block(p) for p in (*positions, *dropped)}

    def _work(self, span: list[int], dropped: list[int]) -> Any:
        step, context = self.step, self.context
        if isinstance(step, Survey):
            (here,) = self._here(span).blocks
            if self.detours is not None and here.replay is not None:
                self.detours.advance(here.index, here.block, here.calls, here.replay.inputs)
            states = {} if self.detours is None else self.detours.states()
            outputs, last = self._outputs(span), span[-1] + 1 == len(self.groups)
            note = look(step, self.stage, context, here, outputs, last, states)
            self.hidden = outputs
            return note
        if self.reference is not None and self.hidden is not None:
            self.reference.advance(span, self._old_blocks(span, dropped), self.hidden)
        figures: dict[str, float] = {}
        for index in span:
            if len(self.groups[index]) > 1:
                figures |= self._merge(index)
        here = self._here(span, dropped)
        with ExitStack() as stack:
            # What learns adds parameters of its own; all other steps touch no gradients.
            if step.settle or step.keep:
                for block in (*(h.block for h in here.blocks), *here.dropped):
                    stack.enter_context(frozen(block))
            figures |= act(step, context, here, self.decision)
            if step.keep is None:
                for one in here.blocks:
                    self._store(one)
            self._advance(here)
            if step.keep is not None:
                for one in here.blocks:
                    context.sink.keep(self.stage, one.index, step.keep(one.block))
        return figures

    def _store(self, here: BlockHere) -> None:
        """Hand a block to the sink, as it is when what was put in to learn is out."""
        step, config, anatomy = self.step, self.context.source.model.config, here.anatomy
        if isinstance(step, Stream) and step.settle is not None:
            step.settle(here.block)
        final = block_anatomy(here.block, anatomy.path, here.index, config, anatomy.family)
        self.context.sink.store(self.stage, here.index, here.block, final)

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

    def _here(self, span: list[int], dropped: Iterable[int] = ()) -> SpanHere:
        """Blocks of the result and all that goes with them."""
        blocks = [self._block_here(index, replayed=len(span) == 1) for index in span]
        gone = [self.context.source.block(position) for position in dropped]
        return SpanHere(blocks, self.hidden, self.reference, gone)

    def _block_here(self, index: int, replayed: bool) -> BlockHere:
        source, group = self.context.source, self.groups[index]
        anatomy, block = source.anatomy.blocks[group[0]], source.block(group[0])
        if len(group) > 1:
            config = source.model.config
            anatomy = block_anatomy(block, anatomy.path, group[0], config, anatomy.family)
        calls = self.calls[group[0]]
        replay = None
        if replayed and self.hidden is not None:
            replay = BlockReplay(
                block, anatomy, self.hidden, calls, self._handed, source.device,
                self.context.compute,
            )  # fmt: skip
        learned = self._learned(group[0]) if len(group) == 1 else {}
        return BlockHere(index, block, anatomy, calls, replay, learned)

    def _learned(self, position: int) -> dict[str, torch.Tensor]:
        learned = self.context.learned
        return {} if learned is None else learned.block(position)

    def _advance(self, here: SpanHere) -> None:
        """Run blocks as they are now; the outputs of the last are the next block's inputs."""
        last = here.blocks[-1].index
        part = self.end < len(self.groups) or len(here.blocks) > 1
        if self.hidden is None or (part and last + 1 == self.end):
            here.close()  # nobody reads what would come out
            return
        outputs = self._outputs([last])
        here.run(self.context, outputs)
        self.hidden = outputs

    def _outputs(self, span: list[int]) -> Activations:
        path = hidden_file(self.context, self.stage, span[-1] + 1)
        return Activations(path, checked=True)
