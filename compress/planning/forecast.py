"""What a step takes: multiply-accumulates, peak memory, disk, seconds on this machine.

Predictions from an outline alone. Work is counted, memory is what the engine holds at once, and
seconds follow from a measurement of this machine in the types that are computed in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from compress.linear.statistics import GRAM
from compress.methods.base import Method
from compress.methods.passes import (
    Learn,
    Pass,
    Shapes,
    Sites,
    Stream,
    Survey,
    TrainModel,
    Whole,
    sites_of,
)
from compress.models.anatomy import Site
from compress.models.outline import BlockOutline, Outline
from compress.system.precision import product_speed
from compress.train.options import compute_dtype

if TYPE_CHECKING:
    from compress.data.calibration_spec import CalibrationSpec

# Code and buffers of libraries that are loaded when they are first called.
_LIBRARIES = 64 * 2**20
_LOGITS = 64 * 2**20  # see compress.methods.depth.loss


@dataclass(frozen=True)
class Work:
    """What a step computes, in multiply-accumulates.

    Attributes:
        passes: of forward passes and statistics in the type of calibration passes.
        learning: of all training steps.
        solving: of float32 matrix products that take as long as the solvers.
    """

    passes: float = 0.0
    learning: float = 0.0
    solving: float = 0.0

    @property
    def macs(self) -> float:
        """Of all forward passes, statistics and training steps."""
        return self.passes + self.learning

    def seconds(self, outline: Outline, compute: torch.dtype, learning: torch.dtype) -> float:
        """Time on this machine: the products, half as much again for what lies between, files."""
        products = (
            self.passes / product_speed(compute)
            + self.learning / product_speed(learning)
            + self.solving / product_speed()
        )
        return 1.5 * products + outline.bytes / 2e8


def work(method: Method, outline: Outline, calibration: CalibrationSpec | None) -> Work:
    """What a step computes."""
    steps = method.passes()
    solving = sum(a.work(shapes) for a, _, shapes in _targeted(steps, outline))
    if method.needs == "nothing" or calibration is None:
        return Work(solving=solving)
    tokens = calibration.samples * calibration.length
    forward = sum(x.weights for b in outline.blocks for x in b.linears.values())
    attention = sum(
        b.anatomy.heads * b.anatomy.head_dim * calibration.length for b in outline.blocks
    )
    forwards = heads = grams = 0.0
    for step in steps:
        if isinstance(step, Whole):
            forwards, heads = forwards + step.forwards(outline), heads + step.heads(outline)
        elif isinstance(step, Survey) or (isinstance(step, Stream) and step.inputs):
            forwards += 1
    for action, site, shapes in _targeted(steps, outline):
        if action.statistic(site) == GRAM:
            # Only the upper triangle is computed, in panels.
            grams += 0.6 * max(width for _, width in shapes) ** 2
    in_batch = calibration.batch * calibration.length
    by_block = sum(a.options.steps * a.options.batch * in_batch for a in _learning(steps))
    by_model = sum(
        round(o.steps * o.batch * calibration.length * passes)
        for step in steps
        if isinstance(step, TrainModel)
        for o, passes in step.options
    )
    # A backward pass costs two forward passes; the dense targets of a block cost one more.
    learning = 3.0 * (by_block + by_model) * (forward + attention)
    learning += 3.0 * by_model * outline.head_weights
    if by_block:
        forwards += 1
    products = forwards * (forward + attention) + grams + heads * outline.head_weights
    return Work(tokens * products, learning, solving)


def learning_dtype(method: Method, device: torch.device) -> torch.dtype:
    """Type of the matrix products of a step's trainings."""
    steps = method.passes()
    options = [o for step in steps if isinstance(step, TrainModel) for o, _ in step.options]
    options += [action.options for action in _learning(steps)]
    return compute_dtype(options[0].precision if options else "float32", device)


def peak_bytes(
    method: Method,
    outline: Outline,
    calibration: CalibrationSpec | None,
    compute: torch.dtype = torch.float32,
) -> int:
    """Bytes held at once by a step beyond what the process holds before it."""
    widths = [
        max(width for _, width in shapes)
        for action, site, shapes in _targeted(method.passes(), outline)
        if action.statistic(site) == GRAM
    ]
    # LAPACK works on copies in column order.
    workspace = 8 * max(widths, default=0) ** 2
    return _LIBRARIES + workspace + tensor_bytes(method, outline, calibration, compute)


def tensor_bytes(
    method: Method,
    outline: Outline,
    calibration: CalibrationSpec | None,
    compute: torch.dtype = torch.float32,
) -> int:
    """The part of :func:`peak_bytes` that is tensors."""
    whole, outer = 4 * outline.parameters, 4 * outline.outer_parameters
    batch = _batch_bytes(outline, calibration)
    passes = method.passes()
    trained = [step for step in passes if isinstance(step, TrainModel)]
    if trained:
        shapes = [s for b in outline.blocks for s in _matrices(b)]
        held = max(
            # Of what learns outside the blocks: the gradient and two averages of Adam.
            step.memory(shapes) + (3 * outer if step.keep_outer is not None else 0)
            for step in trained
        )
        # Stored for the backward pass: a dozen states a block, the widest layer twice.
        kept = 8 * len(outline.blocks) * batch
        return round(1.2 * (whole + held + kept))
    if any(isinstance(step, Whole) for step in passes):
        tokens = calibration.samples * calibration.length
        # Hidden states of all batches, and logits of a piece in three versions.
        logits = 12 * calibration.batch * calibration.length * outline.vocab_size
        return whole + 4 * tokens * outline.hidden_size + batch + min(logits, _LOGITS)
    block = 4 * max(_block_parameters(b) for b in outline.blocks)
    narrow = block * outline.value_bits // 32 if outline.value_bits < 32 else 0
    site_bytes = gram = 0
    for action, site, shapes in _targeted(passes, outline):
        width = max(width for _, width in shapes)
        own = 4 * width**2 if action.statistic(site) == GRAM else 0
        gram = max(gram, own)
        site_bytes = max(site_bytes, own + action.memory(shapes, own > 0))
    largest = 4 * max(x.weights for b in outline.blocks for x in b.linears.values())
    # Filled from a file of another type, and written to one, with one tensor under way.
    moved = block + narrow + largest
    if method.needs == "nothing":
        # The outer tensors come in when the result is verified, without any block.
        return max(moved, block + site_bytes, outer)
    cast = block * compute.itemsize // 4 if compute.itemsize < 4 else 0
    for action in _learning(passes):
        held = max(action.memory(_matrices(b)) for b in outline.blocks)
        site_bytes = max(site_bytes, held + 8 * batch)
    return max(moved, outer + batch, block + cast + gram + batch, block + site_bytes)


def _targeted(passes: tuple[Pass, ...], outline: Outline) -> Iterator[tuple[Sites, Site, Shapes]]:
    """What is done to sites, and (out, in) of the linears there."""
    for action in sites_of(passes):
        for block in outline.blocks:
            for site in block.anatomy.sites:
                linears = [block.linears[name] for name in action.targets(block.anatomy, site)]
                if linears:
                    yield action, site, [(x.out_features, x.in_features) for x in linears]


def _learning(passes: tuple[Pass, ...]) -> list[Learn]:
    return [action for step in passes if isinstance(step, Stream) for action in step.learning]


def _matrices(block: BlockOutline) -> Shapes:
    """(out, in) of all plain linears of a block, those that layers are made of among them."""
    return [shape for linear in block.linears.values() for shape in linear.matrices]


def _block_parameters(block: BlockOutline) -> int:
    return block.other_parameters + sum(x.weights for x in block.linears.values())


def _batch_bytes(outline: Outline, calibration: CalibrationSpec | None) -> int:
    """Activations of one batch inside a block."""
    if calibration is None:
        return 0
    tokens = min(calibration.batch, calibration.samples) * calibration.length
    widths = [max(b.anatomy.ffn, outline.hidden_size) for b in outline.blocks]
    return 4 * tokens * (6 * outline.hidden_size + 4 * max(widths))


def activation_bytes(outline: Outline, calibration: CalibrationSpec | None) -> int:
    """Stored activations at their largest: a block's inputs and outputs, and both of its cuts."""
    if calibration is None:
        return 0
    tokens = calibration.samples * calibration.length
    widest = max(b.anatomy.heads * b.anatomy.head_dim + b.anatomy.ffn for b in outline.blocks)
    return 4 * tokens * (3 * outline.hidden_size + widest)
