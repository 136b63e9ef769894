"""Carry out one step of a recipe on a model: the passes of its method, one after the other."""

from __future__ import annotations

from typing import Any

from compress.engine.context import Learned, StepContext, fill_whole, release_whole
from compress.engine.learning import train_model
from compress.engine.streaming import Streaming
from compress.linear.casting import computing
from compress.methods.base import Method
from compress.methods.passes import KeepBlocks, Stream, Survey, TrainModel, Whole
from compress.methods.questions import stages, unrolled
from compress.models.groups import Groups, check_groups, composed, single


def run_step(method: Method, context: StepContext, joining: bool = False) -> Any:
    """Carry out the passes of a method; returns what was decided last (None where nothing was).

    Passes that the sink knows to be finished are not done again: what they have made is taken up.

    Args:
        joining: only take part in the first training of the whole model that is not finished; the
            process that carries out the step does all else.

    Raises:
        CompressError: naming the block at which it happened.
    """
    passes = unrolled(method.passes(), len(context.source.anatomy.blocks))
    decision = None
    for stage, step in zip(stages(passes), passes, strict=True):
        anatomy = context.source.anatomy
        groups = single(len(anatomy.blocks))
        match step:
            case Survey():
                Streaming(step, stage, method.name, context, None, groups).run()
                decision = step.decide(context.sink.notes(stage), anatomy)
            case Whole():
                decision = _decide_on_whole_model(step, stage, context)
            case Stream():
                if step.groups is not None:
                    groups = step.groups(decision, anatomy)
                    check_groups(groups, len(anatomy.blocks), step.most)
                Streaming(step, stage, method.name, context, decision, groups).run()
                if step.keep is None:
                    _take_up(stage, groups, context)
                else:
                    context.learned = Learned(context.sink, stage)
            case TrainModel():
                finished = bool(context.sink.finished(stage))
                train_model(step, stage, context, decision)
                context.learned = Learned(context.sink, stage, step.keep_outer is not None)
                if joining and not finished:
                    return decision
            case KeepBlocks():
                groups = [[index] for index in step.kept(decision, anatomy)]
                check_groups(groups, len(anatomy.blocks), 1)
                _take_up(stage, groups, context)
    return decision


def _take_up(stage: str, groups: Groups, context: StepContext) -> None:
    """Go on with what a pass has made of the model."""
    alone = groups == single(len(context.source.anatomy.blocks))
    context.source = context.sink.changed(stage, groups, context.source)
    if not alone:
        context.groups = composed(context.groups, groups)
        context.learned = None  # it was learned of other blocks


def _decide_on_whole_model(whole: Whole, stage: str, context: StepContext) -> Any:
    done = context.sink.notes(stage)
    if done:
        return done[0]
    batches = fill_whole(context)
    source = context.source
    # A streamed model is released afterwards: it need not be in memory in both types.
    with computing(source.model, context.compute, keep=source.live):
        decision = whole.decide(source.model, source.anatomy, batches)
    context.sink.record(stage, 0, decision, None)
    release_whole(context)
    return decision
