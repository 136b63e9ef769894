"""What a step takes of memory and disk, from an outline alone: what the engine holds at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from compress.methods.base import Method
from compress.methods.passes import Pass, Stream, Survey, TrainModel, Whole
from compress.methods.questions import each_once, merged, together, unrolled, uses_original
from compress.models.outline import BlockOutline, Outline
from compress.planning.activations import LOGITS, batch_bytes, learning_bytes, training_bytes
from compress.planning.targets import matrices, seen, surveyed, targeted

if TYPE_CHECKING:
    from compress.data.calibration_spec import CalibrationSpec

# Code and buffers of libraries that are loaded when they are first called: 67 MB measured around a
# first small step on two threads.
_LIBRARIES = 96 * 2**20


def peak_bytes(
    method: Method,
    outline: Outline,
    calibration: CalibrationSpec | None,
    compute: torch.dtype = torch.float32,
    original: Outline | None = None,
) -> int:
    """Bytes held at once by a step beyond what the process holds before it.

    Args:
        outline: of the model that enters the step.
        original: of the model that the recipe began with; None: the same.
    """
    found = targeted(unrolled(method.passes(), len(outline.blocks)), outline)
    widths = [width for target in found for width in target.statistics.grams]
    # LAPACK works on copies in column order.
    workspace = 8 * max(widths, default=0) ** 2
    tensors = tensor_bytes(method, outline, calibration, compute, original)
    return _LIBRARIES + workspace + tensors


def tensor_bytes(
    method: Method,
    outline: Outline,
    calibration: CalibrationSpec | None,
    compute: torch.dtype = torch.float32,
    original: Outline | None = None,
) -> int:
    """The part of :func:`peak_bytes` that is tensors."""
    passes = unrolled(method.passes(), len(outline.blocks))
    batch = batch_bytes(outline, calibration)
    if any(isinstance(step, TrainModel) for step in passes):
        return _training_bytes(passes, outline, original or outline, calibration)
    if any(isinstance(step, Whole) for step in passes):
        assert calibration is not None  # a method that asks for batches needs calibration
        tokens = calibration.samples * calibration.length
        # Hidden states of all batches, and logits of a piece in three versions.
        logits = 12 * calibration.batch * calibration.length * outline.vocab_size
        held = 4 * tokens * outline.hidden_size + batch + min(logits, LOGITS)
        whole = 4 * outline.parameters + held
        streamed = _streaming_bytes(method, passes, outline, original, calibration, compute)
        return max(whole, streamed)
    return _streaming_bytes(method, passes, outline, original, calibration, compute)


def _training_bytes(
    passes: tuple[Pass, ...],
    outline: Outline,
    original: Outline,
    calibration: CalibrationSpec | None,
) -> int:
    """Bytes of a step that trains the whole model."""
    shapes = [shape for block in outline.blocks for shape in matrices(block)]
    held = 0
    for step in passes:
        if isinstance(step, TrainModel):
            # Of what learns outside the blocks: the gradient and two averages of Adam.
            outer = 12 * outline.outer_parameters if step.keep_outer is not None else 0
            teacher = 4 * original.parameters if step.teacher else 0
            own = step.memory(shapes) + step.holds(outline)
            kept = training_bytes(step, outline, calibration)
            held = max(held, own + outer + teacher + kept)
    return round(1.2 * (4 * outline.parameters + held))


def _streaming_bytes(
    method: Method,
    passes: tuple[Pass, ...],
    outline: Outline,
    original: Outline | None,
    calibration: CalibrationSpec | None,
    compute: torch.dtype,
) -> int:
    """Bytes of a step with one block, or the blocks of a group, in memory at a time."""
    outer, batch = 4 * outline.outer_parameters, batch_bytes(outline, calibration)
    largest_block = 4 * max(_block_parameters(b) for b in outline.blocks)
    # What becomes of a group is there beside it, and as large where nothing has been taken away.
    many = min(together(passes), len(outline.blocks))
    block = largest_block * max(many, 2 * merged(passes) if merged(passes) > 1 else 1)
    if uses_original(passes):
        block += 4 * max(_block_parameters(b) for b in (original or outline).blocks)
    narrow = largest_block * outline.value_bits // 32 if outline.value_bits < 32 else 0
    site_bytes = statistics = 0
    for target in targeted(passes, outline):
        own = target.statistics.bytes
        statistics = max(statistics, own)
        solving = target.action.memory(target.shapes, bool(target.statistics.grams))
        site_bytes = max(site_bytes, own + solving)
    for step in passes:
        if isinstance(step, Survey):
            # Those of all sites of a block are there when it is observed.
            held = [sum(s.bytes for s in surveyed(step, block)) for block in outline.blocks]
            statistics = max(statistics, max(held) + step.memory(outline))
    largest = 4 * max(x.weights for b in outline.blocks for x in b.linears.values())
    # Filled from a file of another type, and written to one, with one tensor under way.
    moved = block + narrow + largest
    if method.needs == "nothing":
        # The outer tensors come in when the result is verified, without any block.
        return max(moved, block + site_bytes, outer)
    cast = many * largest_block * compute.itemsize // 4 if compute.itemsize < 4 else 0
    for step in passes:
        for action in step.learning if isinstance(step, Stream) else ():
            # A closed form holds no gradients, but what one block is fitted with.
            most = many if step.spans and action.options else 1
            learning = most * max(action.memory(matrices(block)) for block in outline.blocks)
            kept = learning_bytes(action, outline, calibration, most)
            site_bytes = max(site_bytes, learning + kept)
    return max(moved, outer + batch, block + cast + statistics + batch, block + site_bytes)


def _block_parameters(block: BlockOutline) -> int:
    return block.other_parameters + sum(x.weights for x in block.linears.values())


def activation_bytes(outline: Outline, calibration: CalibrationSpec | None, merged: int = 1) -> int:
    """Stored activations at their largest: a block's inputs and outputs, and both of its cuts.

    Args:
        merged: blocks that become one, at most, which may be as wide as all of them.
    """
    if calibration is None:
        return 0
    tokens = calibration.samples * calibration.length
    widest = max(b.anatomy.heads * b.anatomy.head_dim + b.anatomy.ffn for b in outline.blocks)
    return 4 * tokens * (3 * outline.hidden_size + merged * widest)


def training_disk_bytes(method: Method, calibration: CalibrationSpec | None) -> int:
    """What the trainings of a step leave in the run's folder while they last."""
    if calibration is None:
        return 0
    trainings = (p for p in each_once(method.passes()) if isinstance(p, TrainModel))
    return sum(p.disk(calibration.samples, calibration.length) for p in trainings)


def survey_disk_bytes(method: Method, outline: Outline, calibration: CalibrationSpec | None) -> int:
    """What the surveys of a step keep in the run's folder: of blocks, and on detours."""
    passes = unrolled(method.passes(), len(outline.blocks))
    kept, largest = 0, 0.0
    for step in passes:
        if isinstance(step, Survey):
            kept += step.disk(outline)
            if step.detours and calibration is not None:
                tokens = calibration.samples * calibration.length
                states = 4 * tokens * outline.hidden_size * seen(step.batches, calibration)
                # In front of the last block and behind it.
                largest = max(largest, 2 * len(outline.blocks) * states)
    return kept + round(largest)
