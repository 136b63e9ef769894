"""The parts of a step that learn by gradients: what blocks are to reproduce, and the whole model.

A block that learns by itself is given inputs and targets. Its inputs come from the compressed
blocks in front of it; its targets, by default, from the uncompressed model, so that a block also
makes up for the errors of those before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.engine.context import StepContext, fill_whole, hidden_file, release_whole
from compress.linear.casting import computing
from compress.methods.passes import TRAIN, Stream, TrainModel
from compress.methods.work import SiteWork
from compress.models.replay import BlockCall
from compress.system.activations import Activations
from compress.train.whole import ModelWork


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No parameter of the module requires gradients meanwhile, except those added meanwhile.

    Flags are kept by name, never the parameters themselves: one that is replaced meanwhile must be
    gone when it is replaced, or a block would be in memory twice.
    """
    flags = {name: p.requires_grad for name, p in module.named_parameters()}
    module.requires_grad_(False)
    try:
        yield
    finally:
        for name, parameter in module.named_parameters():
            if name in flags:
                parameter.requires_grad_(flags[name])


class Reference:
    """The uncompressed model's hidden states beside the compressed ones, block after block.

    Args:
        own: True where the uncompressed stream has inputs of its own (targets ``dense``); else each
            block's targets follow from the compressed inputs (``prefix``).
        hidden: the uncompressed stream's inputs of the block that comes next.
    """

    def __init__(self, stage: str, context: StepContext, own: bool, hidden: Activations) -> None:
        self.stage, self.context, self.own, self.hidden = stage, context, own, hidden
        self.targets: Activations = hidden

    def advance(
        self, index: int, block: nn.Module, compressed: Activations, calls: list[BlockCall]
    ) -> None:
        """Run the block, as yet uncompressed; the results are its targets."""
        inputs = self.hidden if self.own else compressed
        self.targets = Activations(self._file(index + 1), checked=True)
        with torch.no_grad(), computing(block, self.context.compute):
            for batch in range(len(inputs)):
                hidden = inputs.read(batch).to(self.context.source.device)
                self.targets.write(batch, calls[batch](block, hidden))
        if self.own:
            self.hidden = self.targets

    def state(self) -> dict[str, Any]:
        return self.targets.state()

    def forget(self, index: int) -> None:
        """Delete what is older than the targets of a finished block."""
        self._file(index).unlink(missing_ok=True)

    def remove(self) -> None:
        self.targets.remove()

    def _file(self, index: int) -> Path:
        return reference_file(self.context, self.stage, index)


def reference_file(context: StepContext, stage: str, index: int) -> Path:
    return hidden_file(context, f"{stage}-reference", index)


def reference_of(step: Stream, context: StepContext, start: int, hidden: Activations) -> Reference:
    """What the blocks from ``start`` on are to return.

    Raises:
        CompressError: an interrupted run's file does not hold what it wrote.
    """
    own = step.targets == "dense"
    if start > 0 and own:
        carried = context.sink.activations(step.stage)["reference"]
        hidden = Activations.resume(reference_file(context, step.stage, start), carried)
    return Reference(step.stage, context, own, hidden)


def train_model(step: TrainModel, context: StepContext, decision: Any) -> None:
    """Let a method train the whole model, starting from what its blocks learned."""
    source, sink = context.source, context.sink
    if sink.finished(TRAIN):
        return
    batches = fill_whole(context)
    with frozen(source.model):
        metrics = _train_filled(step, context, decision, batches)
    # One line for all blocks: a training is finished, or it is done again.
    sink.record(TRAIN, 0, metrics, None)
    release_whole(context)


def _train_filled(
    step: TrainModel, context: StepContext, decision: Any, batches: list[dict[str, torch.Tensor]]
) -> dict[str, float]:
    source, sink = context.source, context.sink
    with torch.no_grad():
        for index, anatomy in enumerate(source.anatomy.blocks):
            for site in anatomy.sites:
                names = step.install.targets(anatomy, site)
                if names:
                    site_work = SiteWork(
                        source.block(index), anatomy, site, names, {}, decision,
                        context.storage_dtype, learned=sink.learned(index),
                    )  # fmt: skip
                    step.install.solve(site_work)
    work = ModelWork(
        source.model, source.anatomy, batches, source.device, context.folder, context.seed,
        context.progress, context.guard, context.precision,
    )  # fmt: skip
    with context.joined():
        step.learn(work)
    for index in range(len(source.anatomy.blocks)):
        sink.keep(TRAIN, index, step.keep(source.block(index)))
    return work.metrics
