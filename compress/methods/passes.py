"""What a step does, as a list of passes that the engine carries out and journals.

A method says what is to happen, in order, and hands over the functions that do it; how blocks are
read, streamed, stored and resumed is the engine's. What :class:`Survey` or :class:`Whole` decided
is in the ``decision`` of what comes after.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from compress.linear.statistics import NOTHING
from compress.methods.work import BlockSurvey, GroupWork, OuterWork, SiteWork
from compress.models.anatomy import Anatomy, BlockAnatomy, Site
from compress.models.outline import Outline
from compress.train.options import TrainingOptions
from compress.train.reconstruction import BlockWork
from compress.train.whole import ModelWork

# Kinds of passes as a journal names them: the dense model is looked at; blocks learn, which changes
# nothing yet; the whole model trains; blocks change and are stored; blocks are dropped.
SURVEY, LEARN, TRAIN, SOLVE, KEPT = "survey", "learn", "train", "solve", "kept"

Shapes = list[tuple[int, int]]  # (out, in) of the linears that a step targets in one site


def nothing(_site: Site) -> str:
    """The statistic of a site whose inputs nobody has to know."""
    return NOTHING


def little_memory(shapes: Shapes, _gram: bool) -> int:
    """Bytes of a solver that holds a few copies of one weight."""
    return 12 * max(out * width for out, width in shapes)


@dataclass(frozen=True)
class Effort:
    """What a solver computes and moves, for the forecast of its time.

    Attributes:
        products: multiply-accumulates of float32 matrix products that would take as long as its
            products and factorisations do.
        moved: bytes that all its other operations write.
    """

    products: float = 0.0
    moved: float = 0.0


def little_work(shapes: Shapes) -> Effort:
    """The effort of a solver that passes over each weight a few times."""
    return Effort(moved=20.0 * sum(out * width for out, width in shapes))


def no_work(_outline: Outline) -> float:
    """Multiply-accumulates of what computes nothing beside what is counted anyway."""
    return 0.0


def no_disk(_sequences: int, _length: int) -> int:
    """Bytes of a training that leaves nothing beside its checkpoints."""
    return 0


def all_blocks(_count: int) -> float:
    """The share of the blocks that a pass works on which leaves none alone."""
    return 1.0


def no_bytes(_outline: Outline) -> int:
    """Bytes of what keeps nothing beside what is counted anyway."""
    return 0


def no_outputs(_outline: Outline, _batches: int, _tokens: int) -> int:
    """Bytes of what holds no activations beside those of its trainings."""
    return 0


@dataclass(frozen=True)
class Sites:
    """Inside a block: bring the sites with targets to a function, in the order of execution.

    Attributes:
        targets: linears of a site that are worked on; none: the site is passed over.
        solve: changes the linears of one site (and, for width, their producers) in place.
        statistic: what ``solve`` must know of a site's inputs (:mod:`compress.linear.statistics`).
        batches: on how many calibration batches, at most, statistics are collected; None: all.
        memory: bytes that solving a site takes at its peak beyond the block and the statistics,
            from the shapes, and whether the statistics hold a Gram matrix.
        work: what solving a site takes.
    """

    targets: Callable[[BlockAnatomy, Site], tuple[str, ...]]
    solve: Callable[[SiteWork], None]
    statistic: Callable[[Site], str] = nothing
    batches: int | None = None
    memory: Callable[[Shapes, bool], int] = little_memory
    work: Callable[[Shapes], Effort] = little_work


@dataclass(frozen=True)
class Learn:
    """Inside a block, or several at once: train on inputs and on what is to be returned for them.

    Attributes:
        learn: trains; parameters that were there before do not require gradients.
        options: of the training, for the forecast; a batch counts calibration batches. None where
            what is learned has a closed form.
        memory: bytes that it holds beyond the weights, from the shapes of a block's linears; blocks
            that are trained together hold so much each, a closed form once.
        forwards: passes over the calibration batches beside the training.
    """

    learn: Callable[[BlockWork], None]
    options: TrainingOptions | None
    memory: Callable[[Shapes], int]
    forwards: float = 0.0


@dataclass(frozen=True)
class Survey:
    """Look at the model that enters the pass, block after block, then decide.

    Attributes:
        observe: condenses one block into a small JSON-able note.
        decide: turns the notes of all blocks into a JSON-able decision.
        statistic: what ``observe`` must know of a site's inputs, as in :class:`Sites`.
        memory: bytes that observing a block takes beyond the block and the statistics.
        disk: bytes of all that is kept of blocks for the observation of later ones.
        batches: calibration batches, at most, that pass through the blocks; None: all.
        detours: blocks without each of which the model is run, too: the hidden states that it then
            has are carried along, and :class:`BlockSurvey` has them. None: the model as it is.
        forwards: passes over the calibration batches that observing takes by itself.
    """

    observe: Callable[[BlockSurvey], Any]
    decide: Callable[[list[Any], Anatomy], Any]
    statistic: Callable[[Site], str] = nothing
    memory: Callable[[Outline], int] = no_bytes
    disk: Callable[[Outline], int] = no_bytes
    batches: int | None = None
    detours: Callable[[Anatomy], Collection[int]] | None = None
    forwards: float = 0.0


@dataclass(frozen=True)
class Whole:
    """Decide with the whole model in memory.

    Attributes:
        decide: (model, anatomy, batches) -> a JSON-able decision.
        forwards: how often the calibration batches pass through all blocks.
        heads: how often they pass through the model's head.
    """

    decide: Callable[[nn.Module, Anatomy, list[dict[str, torch.Tensor]]], Any]
    forwards: Callable[[Outline], float]
    heads: Callable[[Outline], float]


@dataclass(frozen=True)
class Stream:
    """Pass over the blocks, one in memory at a time, and work on each.

    Where several become one or learn together, so many are in memory at a time.

    Attributes:
        actions: what is done to a block, in order.
        inputs: the inputs of each block are carried along, as the blocks in front of it make them.
        batches: calibration batches, at most, that pass through the blocks; None: all.
        targets: what a block that learns is to return. ``dense``: the outputs of the model that
            enters the pass. ``prefix``: what the blocks of that model that this one stands for make
            of the inputs that reach it now. ``original``: the outputs of the model that the recipe
            began with, behind the last block that this one stands for.
        settle: called when all is done to a block: takes out what was put in to learn.
        keep: instead of storing the block: takes out what was put in, leaves the block as it was
            and returns what was learned, which later passes find in ``SiteWork.learned``.
        groups: (decision, anatomy) -> which neighbouring blocks become one, in order: indices, a
            list a block of the result. Blocks in none are dropped. None: each block by itself.
        merge: makes the block of a group of several, before the actions are done to it. What blocks
            learn then is what the last block of the group returned.
        spans: (decision, anatomy) -> which neighbouring blocks of the result learn together: lists
            of their indices there. They are to return what the last of them is to return. In memory
            with them are the blocks that they stand for and that are in no group. Sites find no
            statistics in them. Blocks in no span are worked on by themselves; None: all of them.
        most: blocks of the model that enters the pass in a group or a span, at most: so many are in
            memory at once.
        only: (decision, anatomy) -> which blocks of the result are worked on, by index; all others
            stay as they are, files and all, and those behind the last one are not even run. None:
            all of them.
        outer: changes what lies outside the blocks, before the first of them. The residual stream
            may become narrower so, if the actions make every block fit it.
        closing: changes what lies outside the blocks, behind the last of them; what enters the head
            by then is told. The blocks see the embedding as it was.
        share: of so many blocks, those that are worked on, as a share; for the forecast.
    """

    actions: tuple[Sites | Learn, ...]
    inputs: bool = True
    batches: int | None = None
    targets: Literal["dense", "prefix", "original"] = "dense"
    settle: Callable[[nn.Module], None] | None = None
    keep: Callable[[nn.Module], dict[str, torch.Tensor]] | None = None
    groups: Callable[[Any, Anatomy], list[list[int]]] | None = None
    merge: Callable[[GroupWork], nn.Module] | None = None
    spans: Callable[[Any, Anatomy], list[list[int]]] | None = None
    most: int = 1
    only: Callable[[Any, Anatomy], Collection[int]] | None = None
    outer: Callable[[OuterWork], None] | None = None
    closing: Callable[[OuterWork], None] | None = None
    share: Callable[[int], float] = all_blocks

    @property
    def learning(self) -> list[Learn]:
        return [action for action in self.actions if isinstance(action, Learn)]


@dataclass(frozen=True)
class TrainModel:
    """Train the whole model, in memory.

    Attributes:
        install: puts in what learns, from what earlier passes have learned.
        learn: trains; parameters that were there before do not require gradients.
        keep: as in :class:`Stream`, of each block.
        options: of its trainings, each with the forward and backward passes that a sequence takes.
        memory: bytes that it holds beyond the weights, from the shapes of all linears in blocks.
        holds: bytes that it holds beside these, from the model that enters the pass, for what does
            not follow from shapes: the forms of layers.
        graph: what a micro-batch stores for the backward pass, as a multiple of what the model does
            by itself; above 1 where what was put in stores activations of its own.
        by_batch: gradients of whole calibration batches are taken, too, whatever the trainings hold
            at once.
        outputs: bytes of activations that it holds while nothing is trained, from the model that
            enters the pass, the number of calibration batches and the tokens in each.
        keep_outer: what was learned outside the blocks; the ``outer`` of a later pass finds it.
        teacher: the model that the recipe began with is asked for, and so in memory as well.
        disk: bytes that it leaves in the run's folder while it lasts, beside its checkpoints, from
            the number of sequences and their length.
        work: multiply-accumulates of a step of its trainings beside what the model computes, from
            the model that enters the pass.
        stepped: bytes of what it holds that each step of its trainings goes over, from the shapes
            of all linears in blocks; None: all of it.
        once: its steps end with the calibration sequences.
    """

    install: Sites | None
    learn: Callable[[ModelWork], None]
    keep: Callable[[nn.Module], dict[str, torch.Tensor]]
    options: tuple[tuple[TrainingOptions, float], ...]
    memory: Callable[[Shapes], int]
    keep_outer: Callable[[nn.Module], dict[str, torch.Tensor]] | None = None
    teacher: bool = False
    disk: Callable[[int, int], int] = no_disk
    holds: Callable[[Outline], int] = no_bytes
    work: Callable[[Outline], float] = no_work
    stepped: Callable[[Shapes], int] | None = None
    once: bool = False
    graph: float = 1.0
    by_batch: bool = False
    outputs: Callable[[Outline, int, int], int] = no_outputs


@dataclass(frozen=True)
class KeepBlocks:
    """Drop blocks; the others are left as they are.

    Attributes:
        kept: (decision, anatomy) -> indices of the blocks that stay, in order.
    """

    kept: Callable[[Any, Anatomy], list[int]]


Pass = Survey | Whole | Stream | TrainModel | KeepBlocks


@dataclass(frozen=True)
class Rounds:
    """The same passes over and over, each round on what the one before has made.

    Attributes:
        passes: of a round.
        count: number of rounds, from the number of blocks that enter the step.
    """

    passes: tuple[Pass, ...]
    count: Callable[[int], int]
