"""Learning by gradients in a step: what must not learn meanwhile, and the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.engine.context import OUTER, StepContext, fill_whole, release_whole
from compress.methods.passes import TRAIN, Sites, TrainModel
from compress.methods.work import SiteWork
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


def train_model(step: TrainModel, stage: str, context: StepContext, decision: Any) -> None:
    """Let a method train the whole model, starting from what its blocks learned."""
    source, sink = context.source, context.sink
    if sink.finished(stage):
        return
    batches = fill_whole(context)
    if step.keep_outer is not None:
        sink.touch_outer(source.model)
    with frozen(source.model):
        metrics = _train_filled(step, stage, context, decision, batches)
    # One line for all blocks: a training is finished, or it is done again.
    sink.record(stage, 0, metrics, None)
    release_whole(context)


def _train_filled(
    step: TrainModel,
    stage: str,
    context: StepContext,
    decision: Any,
    batches: list[dict[str, torch.Tensor]],
) -> dict[str, Any]:
    source, sink = context.source, context.sink
    if step.install is not None:
        _install(step.install, context, decision)
    origins = sink.origins()
    if origins == []:
        origins = [(i, i + 1) for i in range(len(source.anatomy.blocks))]
    original = context.original if step.teacher else None
    work = ModelWork(
        source.model, source.anatomy, batches, source.device, _folder(context, stage),
        context.seed, context.progress, context.guard, context.precision,
        teacher=None if original is None else original.whole, origins=origins,
        storage_dtype=context.storage_dtype,
    )  # fmt: skip
    with context.joined():
        step.learn(work)
    for index in range(len(source.anatomy.blocks)):
        sink.keep(stage, index, step.keep(source.block(index)))
    if step.keep_outer is not None:
        sink.keep(stage, OUTER, step.keep_outer(source.model))
    return work.metrics


def _install(install: Sites, context: StepContext, decision: Any) -> None:
    """Put in what learns, from what earlier passes have learned."""
    source, learned = context.source, context.learned
    with torch.no_grad():
        for index, anatomy in enumerate(source.anatomy.blocks):
            kept = {} if learned is None else learned.block(index)
            for site in anatomy.sites:
                names = install.targets(anatomy, site)
                if names:
                    install.solve(
                        SiteWork(
                            source.block(index),
                            anatomy,
                            site,
                            names,
                            {},
                            decision,
                            context.storage_dtype,
                            learned=kept,
                            seed=context.seed,
                        )  # fmt: skip
                    )


def _folder(context: StepContext, stage: str) -> Path | None:
    """Where a training's checkpoints are; each of several in a step has a folder of its own."""
    if context.folder is None or stage == TRAIN:
        return context.folder
    return context.folder.with_name(f"{context.folder.name}-{stage}")
