"""What a step holds of activations at once, and of graphs for backward passes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from compress.methods.passes import Learn, TrainModel
from compress.models.anatomy import OTHER
from compress.models.outline import BlockOutline, Outline

if TYPE_CHECKING:
    from compress.data.calibration_spec import CalibrationSpec

LOGITS = 64 * 2**20  # of a piece in float32, see compress.train.language and methods.depth.loss


def batch_bytes(outline: Outline, calibration: CalibrationSpec | None) -> int:
    """Activations of one calibration batch inside a block."""
    if calibration is None:
        return 0
    return _inside(outline, _in_batch(calibration), calibration.length)


def training_bytes(step: TrainModel, outline: Outline, calibration: CalibrationSpec | None) -> int:
    """The graph of a micro-batch of a whole model, whose examples are sequences, at its largest; or
    the activations that are kept between two trainings.

    Args:
        outline: of the model that enters the pass.
    """
    if calibration is None:
        return 0
    graphs = [(o.at_once, o.gradient_checkpointing) for o, _ in step.options]
    if step.by_batch:
        graphs.append((min(calibration.batch, calibration.samples), False))
    graph = [_model(outline, n, calibration.length, again) for n, again in graphs]
    batches = math.ceil(calibration.samples / calibration.batch)
    most = round(step.graph * max(graph, default=0))
    return max(most, step.outputs(outline, batches, _in_batch(calibration)))


def learning_bytes(
    action: Learn, outline: Outline, calibration: CalibrationSpec | None, blocks: int
) -> int:
    """The graph of a micro-batch of blocks, whose examples are calibration batches.

    Args:
        blocks: that are trained together. A closed form goes through one of them once.
    """
    held = action.options.at_once * blocks if action.options else 1
    made = held * max(map(_made, outline.blocks)) if action.options else 0
    # As much as is stored of each in a whole model; and gradients on their way through one block.
    return made + 2 * (held + 3) * batch_bytes(outline, calibration)


def _in_batch(calibration: CalibrationSpec) -> int:
    """Tokens of a calibration batch."""
    return min(calibration.batch, calibration.samples) * calibration.length


def _model(outline: Outline, sequences: int, length: int, recomputed: bool) -> int:
    tokens = sequences * length
    # Stored for the backward pass: a dozen states a block, and a few times the widest layer.
    block, blocks = 2 * _inside(outline, tokens, length), len(outline.blocks)
    stored = blocks * block
    if recomputed:  # what enters each block, and one block
        stored = 4 * blocks * tokens * outline.hidden_size + block
    # Logits of a piece, those chosen, softmax and gradients, and the same of a teacher.
    return stored + 8 * min(4 * tokens * outline.vocab_size, LOGITS)


def _inside(outline: Outline, tokens: int, length: int) -> int:
    """What is alive in a block's forward pass of sequences of a length, at its largest."""
    most = 0.0
    for block in outline.blocks:
        heads, width = block.anatomy.heads, block.anatomy.ffn + _routed(block)
        scores = 1.5 * heads * length if outline.scored else 0.0
        wide = 6 * outline.hidden_size + 4 * max(width, outline.hidden_size)
        most = max(most, wide + scores)
    return round(4 * tokens * most)


def _made(block: BlockOutline) -> int:
    """Matrices that layers make of their tables whenever they are called, and what goes into them,
    with gradients."""
    layers = (x for x in block.linears.values() if x.layer and not x.parts)
    return 16 * sum(x.out_features * x.in_features for x in layers)


def _routed(block: BlockOutline) -> float:
    """What stands for the FFN where no role is known: experts that a token is sent to, say."""
    others = [site for site in block.anatomy.sites if site.kind == OTHER]
    linears = [block.linears[name] for site in others for name in site.linears]
    return sum(x.share * x.out_features for x in linears) / 2
