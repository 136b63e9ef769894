"""Work on blocks that are in memory: the actions of a pass, or the look of a survey."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from compress.engine.context import StepContext
from compress.engine.reference import Reference
from compress.errors import CompressError
from compress.linear.casting import computing
from compress.linear.layer import features_of
from compress.linear.matrix import is_linear
from compress.linear.statistics import NOTHING, InputStatistics
from compress.methods.passes import Learn, Sites, Stream, Survey
from compress.methods.work import BlockSurvey, SiteWork
from compress.models.anatomy import OTHER, BlockAnatomy, Site
from compress.models.experts import unfused_in
from compress.models.replay import BlockCall, BlockReplay
from compress.system.activations import Activations
from compress.train.reconstruction import BlockWork


@dataclass
class BlockHere:
    """A block of the result, as the actions of a pass find it.

    Attributes:
        index: among the blocks of the result.
        calls: how the model calls it, one entry a batch; none where no inputs are carried along.
        replay: its inputs; None where the pass carries none along, and in a span of several blocks.
        learned: what an earlier pass of the step kept of it.
    """

    index: int
    block: nn.Module
    anatomy: BlockAnatomy
    calls: list[BlockCall]
    replay: BlockReplay | None
    learned: dict[str, torch.Tensor]


@dataclass
class SpanHere:
    """Neighbouring blocks of the result that are worked on together; mostly it is one.

    Attributes:
        inputs: what enters the first of them; None where the pass carries no inputs along.
        reference: what the last of them is to return, where they learn.
        dropped: blocks that the pass takes from among several.
    """

    blocks: list[BlockHere]
    inputs: Activations | None
    reference: Reference | None
    dropped: list[nn.Module]

    def run(self, context: StepContext, outputs: Activations) -> None:
        """Run all batches through the blocks as they are now."""
        first = self.blocks[0].replay
        if first is not None:
            first.finish(outputs.write)
            return
        assert self.inputs is not None
        with torch.no_grad(), ExitStack() as stack:
            for here in self.blocks:
                stack.enter_context(computing(here.block, context.compute))
            for batch in range(len(self.inputs)):
                states = self.inputs.read(batch).to(context.source.device)
                for here in self.blocks:
                    states = here.calls[batch](here.block, states)
                outputs.write(batch, states)

    def close(self) -> None:
        """Forget what replays have stored."""
        for here in self.blocks:
            if here.replay is not None:
                here.replay.close()


def act(step: Stream, context: StepContext, span: SpanHere, decision: Any) -> dict[str, float]:
    """Carry out the actions of a pass on blocks; returns the figures for the journal."""
    metrics: dict[str, float] = {}
    for number, action in enumerate(step.actions):
        # What the replay has stored was computed before the last action.
        if number:
            span.close()
        if isinstance(action, Learn):
            metrics |= _learn(action.learn, context, span)
            continue
        for here in span.blocks:
            first, limit = here.replay, action.batches
            if first is not None and limit is not None and limit < len(first.inputs):
                first = first.head(max(1, limit))
            with torch.no_grad():
                metrics |= _visit(action, context, here, first, decision)
            if first is not None and first is not here.replay:
                first.close()
    return metrics


def _learn(
    learn: Callable[[BlockWork], None], context: StepContext, span: SpanHere
) -> dict[str, float]:
    """Let a method learn on blocks from their inputs and targets."""
    assert span.inputs is not None and span.reference is not None  # of a pass that learns
    work = BlockWork(
        [here.block for here in span.blocks], [here.anatomy for here in span.blocks], span.inputs,
        span.reference.targets, [here.calls for here in span.blocks], context.source.device,
        context.seed + span.blocks[0].index, context.guard, context.precision,
        context.compute, span.dropped,
    )  # fmt: skip
    learn(work)
    return work.metrics


def _visit(
    action: Sites,
    context: StepContext,
    here: BlockHere,
    replay: BlockReplay | None,
    decision: Any,
) -> dict[str, float]:
    """Bring the sites of a block to a method, one after the other."""
    metrics = {}
    for site in here.anatomy.sites:
        names = action.targets(here.anatomy, site)
        if not names:
            continue
        kind, device = action.statistic(site), context.source.device
        statistics = collected(kind, here.block, site, names, replay, device)
        if kind != NOTHING and replay is not None:
            metrics |= _fill_experts(kind, here.block, names, statistics, device)
        if kind != NOTHING and len(statistics) < len(names):
            raise _unseen(next(n for n in names if n not in statistics))
        work = SiteWork(
            here.block, here.anatomy, site, names, statistics, decision, context.storage_dtype,
            learned=here.learned, seed=context.seed,
        )  # fmt: skip
        action.solve(work)
        if work.kept_columns is not None and replay is not None:
            replay.keep_columns(site, work.kept_columns)
        metrics.update({f"{site.kind}.{k}": v for k, v in work.metrics.items()})
    return metrics


def _fill_experts(
    kind: str,
    block: nn.Module,
    names: tuple[str, ...],
    statistics: dict[str, InputStatistics],
    device: torch.device,
) -> dict[str, float]:
    """Give experts to which no token was sent statistics of inputs that are all alike and have
    nothing to do with each other, which is all that is known of them.

    Returns:
        Figures for the journal: linears of experts, and of these how many have seen fewer tokens
        than they have inputs, and none.
    """
    inside = tuple(f"{path}." for path, _ in unfused_in(block))
    routed = [name for name in names if name.startswith(inside)] if inside else []
    few = unseen = 0
    for name in routed:
        width = features_of(block.get_submodule(name))[1]
        if name not in statistics:
            derivable = not is_linear(block.get_submodule(name))
            statistics[name] = InputStatistics(width, kind, device, derivable)
            statistics[name].update(torch.eye(width, device=device))
            unseen += 1
        elif statistics[name].count < width:
            few += 1
    counts = {"experts.linears": len(routed), "experts.few": few, "experts.unseen": unseen}
    return {name: float(count) for name, count in counts.items()} if routed else {}


def _unseen(name: str) -> CompressError:
    return CompressError(
        "calibration inputs that reach every linear", f"none at {name}",
        "Exclude it: either the model uses its weights without calling it, or it is an expert to "
        "which no token was sent (more samples may reach it)",
    )  # fmt: skip


def look(
    step: Survey,
    stage: str,
    context: StepContext,
    here: BlockHere,
    outputs: Activations,
    last: bool,
    detours: dict[int, Iterator[torch.Tensor]],
) -> Any:
    """Survey a block; its outputs are the next block's inputs."""
    replay, anatomy = here.replay, here.anatomy
    assert replay is not None  # a survey always has inputs
    statistics: dict[str, InputStatistics] = {}
    for site in anatomy.sites:
        kind, device = step.statistic(site), context.source.device
        statistics |= collected(kind, here.block, site, site.linears, replay, device)
    similarity, rows = 0.0, 0

    def consume(batch: int, output: torch.Tensor) -> None:
        nonlocal similarity, rows
        outputs.write(batch, output)
        before = replay.inputs.read(batch).to(output.device)
        cosine = nn.functional.cosine_similarity(before, output, dim=-1)
        cosine = replay.calls[batch].tokens(cosine)
        similarity += float(cosine.double().sum())
        rows += cosine.numel()

    replay.finish(consume)
    survey = BlockSurvey(
        anatomy, here.block, statistics, 1 - similarity / rows, replay.inputs, replay.calls,
        partial(context.sink.learned, stage), outputs, last, detours,
    )  # fmt: skip
    note = step.observe(survey)
    if survey.kept:
        context.sink.keep(stage, here.index, survey.kept)
    return note


def collected(
    kind: str,
    block: nn.Module,
    site: Site,
    names: tuple[str, ...],
    replay: BlockReplay | None,
    device: torch.device,
) -> dict[str, InputStatistics]:
    """Statistics of a site's inputs; linears of a site with one input share one object."""
    if kind == NOTHING or replay is None:
        return {}
    # A low-rank pair's second factor reads what the first makes of the site's input.
    derivable = any(not is_linear(block.get_submodule(n)) for n in names)
    found: dict[str, InputStatistics] = {}

    def observe(name: str, x: torch.Tensor) -> None:
        if name not in found:
            found[name] = InputStatistics(x.shape[-1], kind, device, derivable)
        found[name].update(x)

    replay.visit(site, observe)
    if site.kind != OTHER:
        return dict.fromkeys(names, found[site.linears[0]])
    return {name: found[name] for name in names if name in found}
