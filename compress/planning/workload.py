"""How long a step takes: what it computes and moves, and how fast this machine does either.

Predictions from an outline alone. Matrix products are counted as multiply-accumulates, everything
else as bytes that pass through memory; seconds follow from two measurements of this machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from compress.linear.gram import gram_products, is_fast
from compress.methods.base import Method
from compress.methods.passes import KeepBlocks, Learn, Pass, Stream, Survey, TrainModel, Whole
from compress.methods.questions import each_once, unrolled
from compress.models.outline import Outline
from compress.planning.targets import Statistics, Target, matrices, seen, surveyed, targeted
from compress.system.precision import product_speed, writing_speed
from compress.train.options import TrainingOptions, compute_dtype

if TYPE_CHECKING:
    from compress.data.calibration_spec import CalibrationSpec

_FILES = 2e8  # bytes a second of blocks that are read, checked and written
# Of products in a model's shapes over one that is timed by itself.
_SHAPES = 1.2
# What a token writes in a block beside products: so many states, and activations of an FFN.
_STATES, _INNER = 32, 6
# How often a step of a training goes over all that it holds: gradients, their norm, averages.
_OVER = 1.5


@dataclass(frozen=True)
class Work:
    """What a step computes and moves.

    Attributes:
        passes: multiply-accumulates in the type of calibration: of forward passes, and of Gram
            matrices where these take such products.
        learning: multiply-accumulates of all training steps.
        solving: of float32 matrix products that take as long as solvers and other Gram matrices.
        moved: bytes that operations other than products write.
        files: bytes of the model that are read and written.
        rows: of the products of passes, and of those that learn: tokens that are seen at once.
    """

    passes: float = 0.0
    learning: float = 0.0
    solving: float = 0.0
    moved: float = 0.0
    files: float = 0.0
    rows: tuple[int, int] = (512, 512)

    @property
    def macs(self) -> float:
        """Of all forward passes and training steps."""
        return self.passes + self.learning

    def seconds(self, compute: torch.dtype, learning: torch.dtype) -> float:
        """Time on this machine."""
        products = (
            self.passes / _speed(compute, self.rows[0])
            + self.learning / _speed(learning, self.rows[1])
            + self.solving / product_speed()
        )
        return _SHAPES * products + self.moved / writing_speed() + self.files / _FILES


def _speed(dtype: torch.dtype, rows: int) -> float:
    """Of the products of so many rows, by the powers of two that were timed."""
    return product_speed(dtype, rows=2 ** max(4, min(12, rows.bit_length() - 1)))


def work(
    method: Method,
    outline: Outline,
    calibration: CalibrationSpec | None,
    compute: torch.dtype = torch.float32,
) -> Work:
    """What a step computes and moves; ``compute`` is the type of its calibration passes."""
    steps = unrolled(method.passes(), len(outline.blocks))
    files = 0.0 if all(isinstance(step, KeepBlocks) for step in steps) else float(outline.bytes)
    worked = [(t, share) for step in steps for t, share in _targeted(step, outline)]
    solving = sum(share * t.effort.products for t, share in worked)
    solved = sum(share * t.effort.moved for t, share in worked)
    if method.needs == "nothing" or calibration is None:
        return Work(solving=solving, moved=solved, files=files)
    tokens = calibration.samples * calibration.length
    block = _token_macs(outline, calibration.length)
    forwards, heads = _forwards(steps, outline, calibration)
    gram = partial(gram_products, dtype=compute)
    grams = sum(share * gram(width) for t, share in worked for width in t.statistics.grams)
    grams += sum(gram(width) for s in _surveyed(steps, outline) for width in s.grams)
    products = tokens * (forwards * block + heads * outline.head_weights)
    if is_fast(compute):
        products += tokens * grams
    else:
        solving += tokens * grams
    trainings = [step for step in steps if isinstance(step, TrainModel)]
    by_model, more = _trained(trainings, outline, calibration)
    learned = by_model + _trained_blocks(steps, outline, calibration)
    # A backward pass costs two forward passes.
    learning = 3.0 * (learned * block + by_model * outline.head_weights) + more
    inner = sum(block.anatomy.ffn for block in outline.blocks)
    written = 4.0 * (_STATES * outline.hidden_size * len(outline.blocks) + _INNER * inner)
    moved = (forwards * tokens + 3.0 * learned) * written + solved
    moved += _held(steps, outline, calibration)
    in_batch = calibration.batch * calibration.length
    at_once = [o.at_once * calibration.length for t in trainings for o, _ in t.options]
    rows = in_batch, min(at_once, default=in_batch)
    return Work(products, learning, solving, moved, files, rows)


def _token_macs(outline: Outline, length: int) -> float:
    """Multiply-accumulates of a token in all blocks, in sequences of a length."""
    linears = sum(x.weights for b in outline.blocks for x in b.linears.values())
    return linears + sum(b.anatomy.heads * b.anatomy.head_dim * length for b in outline.blocks)


def _surveyed(steps: tuple[Pass, ...], outline: Outline) -> list[Statistics]:
    """What all surveys collect of all blocks."""
    return [
        found
        for step in steps
        if isinstance(step, Survey)
        for block in outline.blocks
        for found in surveyed(step, block)
    ]


def _trained(
    trainings: list[TrainModel], outline: Outline, calibration: CalibrationSpec
) -> tuple[float, float]:
    """Tokens on which the whole model learns, and multiply-accumulates beside its own."""
    tokens = more = 0.0
    for step in trainings:
        for options, passes in step.options:
            steps = _steps(step, options, calibration)
            tokens += steps * options.batch * calibration.length * passes
            more += steps * step.work(outline)
    return tokens, more


def _trained_blocks(
    steps: tuple[Pass, ...], outline: Outline, calibration: CalibrationSpec
) -> float:
    """Tokens on which blocks learn, each by itself, as if all of them did."""
    in_batch = calibration.batch * calibration.length
    return sum(
        step.share(len(outline.blocks)) * a.options.steps * a.options.batch * in_batch
        for step, a in _learning(steps)
        if a.options
    )


def _forwards(
    steps: tuple[Pass, ...], outline: Outline, calibration: CalibrationSpec
) -> tuple[float, float]:
    """How often the calibration batches pass through all blocks, and through the head."""
    forwards = heads = 0.0
    for step in steps:
        if isinstance(step, Whole):
            forwards, heads = forwards + step.forwards(outline), heads + step.heads(outline)
        elif isinstance(step, Survey):
            detours = len(outline.blocks) / 2 if step.detours else 0
            forwards += (1 + detours + step.forwards) * seen(step.batches, calibration)
        elif isinstance(step, Stream) and step.inputs:
            # What blocks are to return is made by as many again.
            again = sum(1 + a.forwards for a in step.learning)
            worked = step.share(len(outline.blocks)) * again
            forwards += (1 + worked) * seen(step.batches, calibration)
    return forwards, heads


def _targeted(step: Pass, outline: Outline) -> Iterator[tuple[Target, float]]:
    """What is done to sites, each with the share of the blocks to which it is."""
    if isinstance(step, Stream):
        share = step.share(len(outline.blocks))
        yield from ((target, share) for target in targeted((step,), outline))


def _learning(steps: tuple[Pass, ...]) -> Iterator[tuple[Stream, Learn]]:
    for step in steps:
        if isinstance(step, Stream):
            yield from ((step, action) for action in step.learning)


def _steps(step: TrainModel, options: TrainingOptions, calibration: CalibrationSpec) -> int:
    """Of a training of the whole model."""
    least = math.ceil(calibration.samples / options.batch)
    return min(options.steps, least) if step.once else options.steps


def _held(steps: tuple[Pass, ...], outline: Outline, calibration: CalibrationSpec) -> float:
    """Bytes of what learns and of what its optimiser holds, as often as it is gone over."""
    found = 0.0
    for step, action in _learning(steps):
        if action.options:
            held = sum(action.memory(matrices(block)) for block in outline.blocks)
            found += step.share(len(outline.blocks)) * action.options.steps * held
    for step in steps:
        if isinstance(step, TrainModel):
            shapes = [shape for block in outline.blocks for shape in matrices(block)]
            outer = 12 * outline.outer_parameters if step.keep_outer is not None else 0
            own = (step.stepped or step.memory)(shapes)
            done = sum(_steps(step, o, calibration) for o, _ in step.options)
            found += done * (own + step.holds(outline) + outer)
    return _OVER * found


def learning_dtype(method: Method, device: torch.device) -> torch.dtype:
    """Type of the matrix products of a step's trainings."""
    steps = tuple(each_once(method.passes()))
    options = [o for step in steps if isinstance(step, TrainModel) for o, _ in step.options]
    options += [action.options for _, action in _learning(steps) if action.options]
    return compute_dtype(options[0].precision if options else "float32", device)
