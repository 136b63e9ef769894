"""Carry out one step of a recipe on a model: survey, decide, then solve block after block.

The same code serves a checkpoint on disk (one block in memory at a time, each finished block handed
to a sink that makes it durable) and a live model (blocks changed in place).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from compress.engine.context import StepContext, fill_whole, hidden_file, release_whole
from compress.engine.learning import Reference, frozen, reference_of, train_model
from compress.errors import CompressError
from compress.linear.casting import computing
from compress.linear.matrix import is_linear
from compress.linear.statistics import NOTHING, InputStatistics
from compress.methods.base import Method
from compress.methods.passes import (
    SURVEY,
    KeepBlocks,
    Learn,
    Sites,
    Stream,
    Survey,
    TrainModel,
    Whole,
)
from compress.methods.work import BlockSurvey, SiteWork
from compress.models.anatomy import OTHER, Site, block_anatomy
from compress.models.replay import BlockCall, BlockReplay
from compress.models.stream import capture_inputs
from compress.system.activations import Activations, LostActivations
from compress.train.reconstruction import BlockWork


def run_step(method: Method, context: StepContext) -> Any:
    """Carry out the passes of a method; returns what was decided (None where nothing was).

    Raises:
        CompressError: naming the block at which it happened.
    """
    decision = None
    for step in method.passes():
        match step:
            case Survey():
                notes = _stream(step, method.name, context, None)
                decision = step.decide(notes, context.source.anatomy)
            case Whole():
                decision = _decide_on_whole_model(step, context)
            case Stream():
                _stream(step, method.name, context, decision)
            case TrainModel():
                train_model(step, context, decision)
            case KeepBlocks():
                pass  # whoever holds the blocks drops them when the step is over
    return decision


def _decide_on_whole_model(whole: Whole, context: StepContext) -> Any:
    done = context.sink.notes(SURVEY)
    if done:
        return done[0]
    batches = fill_whole(context)
    source = context.source
    # A streamed model is released afterwards: it need not be in memory in both types.
    with computing(source.model, context.compute, keep=source.live):
        decision = whole.decide(source.model, source.anatomy, batches)
    context.sink.record(SURVEY, 0, decision, None)
    release_whole(context)
    return decision


def _stream(step: Survey | Stream, name: str, context: StepContext, decision: Any) -> list[Any]:
    """Pass over all blocks behind the last finished one; returns the notes of all."""
    source, sink = context.source, context.sink
    stage = SURVEY if isinstance(step, Survey) else step.stage
    count = len(source.anatomy.blocks)
    start = sink.finished(stage)
    if start == count:
        return sink.notes(stage)
    needs_inputs = isinstance(step, Survey) or step.inputs
    calls: list[list[BlockCall]] = [[] for _ in range(count)]
    hidden, reference = None, None
    if needs_inputs:
        try:
            chosen = None if isinstance(step, Survey) else step.batches
            hidden, calls = _first_inputs(stage, context, start, chosen)
            if isinstance(step, Stream) and step.learning:
                reference = reference_of(step, context, start, hidden)
        except LostActivations as lost:
            sink.again(stage, f"{lost.got}, so {name} starts its {stage} pass anew")
            return _stream(step, name, context, decision)
    learned: dict[str, Any] = {}
    for index in range(start, count):
        context.guard()
        block = source.block(index)
        sink.load(index, block)
        block.to(source.device)
        anatomy = source.anatomy.blocks[index]
        try:
            replay = None
            if needs_inputs:
                replay = BlockReplay(
                    block, anatomy, hidden, calls[index], context.scratch, source.device, learned,
                    context.compute,
                )  # fmt: skip
            if isinstance(step, Survey):
                note, hidden = _survey_block(step, context, index, block, replay)
            else:
                if reference is not None:
                    reference.advance(index, block, hidden, calls[index])
                # What learns adds parameters of its own; all other steps touch no gradients.
                with frozen(block) if step.settle or step.keep else nullcontext():
                    note = _work_on_block(step, context, index, replay, decision, reference)
                    hidden = _advance(context, stage, index, replay)
                    if step.keep is not None:
                        sink.keep(stage, index, step.keep(block))
        except CompressError as error:
            raise error.within(f"step {name}, block {index}") from error
        finally:
            source.release_block(index)
        carried = None
        if hidden is not None:
            carried = hidden.state()
            if reference is not None:
                carried |= {"reference": reference.state()}
        sink.record(stage, index, note, carried)
        # Only now is the previous block's input of no use to anybody.
        if needs_inputs:
            hidden_file(context, stage, index).unlink(missing_ok=True)
            if reference is not None:
                reference.forget(index)
        context.report(stage, index, count, note)
    for stored in (hidden, reference):
        if stored is not None:
            stored.remove()
    return sink.notes(stage)


def _first_inputs(
    stage: str, context: StepContext, start: int, limit: int | None
) -> tuple[Activations, list[list[BlockCall]]]:
    """Inputs of block ``start``, of at most ``limit`` batches, and how each block is called."""
    source = context.source
    hidden = Activations(hidden_file(context, stage, 0))
    source.fill_outer()
    chosen = context.batches[:limit]
    batches = [{k: v.to(source.device) for k, v in batch.items()} for batch in chosen]
    calls = capture_inputs(source.model, source.anatomy, batches, hidden)
    source.release_outer()
    if start == 0:
        return hidden, calls
    hidden.remove()
    carried = context.sink.activations(stage)
    return Activations.resume(hidden_file(context, stage, start), carried), calls


def _advance(
    context: StepContext, stage: str, index: int, replay: BlockReplay | None
) -> Activations | None:
    """Run the block as it is now; its outputs are the next block's inputs."""
    if replay is None:
        return None
    outputs = Activations(hidden_file(context, stage, index + 1), checked=True)
    replay.finish(outputs.write)
    return outputs


def _work_on_block(
    step: Stream,
    context: StepContext,
    index: int,
    replay: BlockReplay | None,
    decision: Any,
    reference: Reference | None,
) -> dict[str, float]:
    """Carry out the actions of a pass on a block and, where it is to be stored, store it."""
    source = context.source
    block, anatomy = source.block(index), source.anatomy.blocks[index]
    learned = context.sink.learned(index) if step.settle is not None else {}
    metrics: dict[str, float] = {}
    for number, action in enumerate(step.actions):
        # What the replay has stored was computed before the last action.
        if number and replay is not None:
            replay.close()
        if isinstance(action, Learn):
            metrics |= _learn(action.learn, context, index, replay, reference)
            continue
        first = replay
        limit = action.batches
        if replay is not None and limit is not None and limit < len(replay.inputs):
            first = replay.head(max(1, limit))
        with torch.no_grad():
            metrics |= _visit(action, context, index, first, decision, learned)
        if first is not replay:
            first.close()
    if step.keep is not None:
        return metrics
    if step.settle is not None:
        step.settle(block)
    final = block_anatomy(block, anatomy.path, index, source.model.config, anatomy.family)
    context.sink.store(index, block, final)
    return metrics


def _learn(
    learn: Callable[[BlockWork], None],
    context: StepContext,
    index: int,
    replay: BlockReplay,
    reference: Reference,
) -> dict[str, float]:
    """Let a method learn on a block from its inputs and targets."""
    source = context.source
    work = BlockWork(
        source.block(index), source.anatomy.blocks[index], replay.inputs, reference.targets,
        replay.calls, source.device, context.seed + index, context.guard, context.precision,
    )  # fmt: skip
    learn(work)
    return work.metrics


def _visit(
    action: Sites,
    context: StepContext,
    index: int,
    replay: BlockReplay | None,
    decision: Any,
    learned: dict[str, torch.Tensor],
) -> dict[str, float]:
    """Bring the sites of a block to a method, one after the other."""
    source, metrics = context.source, {}
    block, anatomy = source.block(index), source.anatomy.blocks[index]
    for site in anatomy.sites:
        names = action.targets(anatomy, site)
        if not names:
            continue
        kind = action.statistic(site)
        statistics = _collect(kind, block, site, names, replay, source.device)
        if kind != NOTHING and len(statistics) < len(names):
            raise _unseen(next(n for n in names if n not in statistics))
        work = SiteWork(
            block,
            anatomy,
            site,
            names,
            statistics,
            decision,
            context.storage_dtype,
            learned=learned,
        )
        action.solve(work)
        if work.kept_columns is not None and replay is not None:
            replay.keep_columns(site, work.kept_columns)
        metrics.update({f"{site.kind}.{k}": v for k, v in work.metrics.items()})
    return metrics


def _unseen(name: str) -> CompressError:
    return CompressError(
        "calibration inputs that reach every linear", f"none at {name}",
        "Exclude it: either the model uses its weights without calling it, or it is an expert to "
        "which no token was sent (more samples may reach it)",
    )  # fmt: skip


def _collect(
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


def _survey_block(
    step: Survey, context: StepContext, index: int, block: nn.Module, replay: BlockReplay
) -> tuple[Any, Activations]:
    anatomy = context.source.anatomy.blocks[index]
    statistics: dict[str, InputStatistics] = {}
    for site in anatomy.sites:
        kind = step.statistic(site)
        statistics |= _collect(kind, block, site, site.linears, replay, context.source.device)
    outputs = Activations(hidden_file(context, SURVEY, index + 1), checked=True)
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
    survey = BlockSurvey(anatomy, block, statistics, 1 - similarity / rows)
    return step.observe(survey), outputs
