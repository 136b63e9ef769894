"""What a step takes: multiply-accumulates, peak memory, disk, seconds on this machine.

Predictions from an outline alone. Work is counted, memory is what the engine holds at once, and
seconds follow from a quarter-second measurement of this machine.
"""

from __future__ import annotations

import time
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from compress.calibrate.statistics import GRAM
from compress.methods.base import DEPTH, WIDTH, Method
from compress.outline import BlockOutline, Outline

if TYPE_CHECKING:
    from compress.recipe import CalibrationSpec


def work(method: Method, outline: Outline, calibration: CalibrationSpec | None) -> float:
    """Multiply-accumulates of a step."""
    if method.needs == "nothing" or calibration is None:
        return 0.0
    tokens = calibration.samples * calibration.length
    forward = sum(x.weights for b in outline.blocks for x in b.linears.values())
    attention = sum(
        b.anatomy.heads * b.anatomy.head_dim * calibration.length for b in outline.blocks
    )
    passes = method.survey_work(outline)
    grams = 0.0
    if method.kept_blocks is not None and DEPTH not in method.writes:
        passes += 1
        for block in outline.blocks:
            for site in block.anatomy.sites:
                if method.targets(block.anatomy, site) and method.statistic(site) == GRAM:
                    # Only the upper triangle is computed.
                    grams += 0.55 * block.linears[site.linears[0]].in_features ** 2
    in_batch = min(calibration.batch, calibration.samples) * calibration.length
    by_block, by_model = method.learning_tokens(in_batch, calibration.length)
    # A backward pass costs two forward passes; the dense targets of a block cost one more.
    learning = 3 * (by_block + by_model) * (forward + attention)
    if by_block:
        learning += tokens * (forward + attention)
    return tokens * (passes * (forward + attention) + grams) + learning


def peak_bytes(method: Method, outline: Outline, calibration: CalibrationSpec | None) -> int:
    """Bytes held at once by a step beyond what the process holds anyway, float32 throughout."""
    outer = 4 * outline.outer_parameters
    block = 4 * max(_block_parameters(b) for b in outline.blocks)
    learning = method.learns
    if learning is not None and learning.model:
        weights = sum(x.weights for b in outline.blocks for x in b.linears.values())
        # Stored for the backward pass: a dozen states a block, the widest layer twice.
        kept = 8 * len(outline.blocks) * _batch_bytes(outline, calibration)
        held = outer + 4 * outline.parameters + method.learning_bytes(weights) + kept
        return round(1.2 * held)
    if method.works_on != "block":
        return round(1.2 * (outer + 4 * outline.parameters)) + _batch_bytes(outline, calibration)
    largest = 4 * max(x.weights for b in outline.blocks for x in b.linears.values())
    if method.needs == "nothing":
        # A block, one tensor as it is read, and a method's copies of one matrix; the outer tensors
        # come in when the result is verified, without any block.
        return max(block + 4 * largest, outer)
    # The Gram matrix, its damped copy, two factors and a temporary; width refits in float64.
    copies = 9 if WIDTH in method.writes else 5
    site_bytes = 0
    for b in outline.blocks:
        for site in b.anatomy.sites:
            if not method.targets(b.anatomy, site):
                continue
            width = max(b.linears[n].in_features for n in site.linears)
            rows = sum(b.linears[n].out_features for n in site.linears)
            gram = copies * width * width if method.statistic(site) == GRAM else 0
            site_bytes = max(site_bytes, 4 * (gram + 3 * rows * width))
    batch = _batch_bytes(outline, calibration)
    if learning is not None:
        largest = max(sum(x.weights for x in b.linears.values()) for b in outline.blocks)
        site_bytes = max(site_bytes, method.learning_bytes(largest) + 8 * batch)
    return max(outer + batch, block + site_bytes + batch)


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


@lru_cache
def machine_speed() -> float:
    """Multiply-accumulates a second of float32 matrix products on this machine."""
    size = 768
    a, b = torch.rand(size, size), torch.rand(size, size)
    a @ b
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < 0.25:
        a @ b
        count += 1
    return count * size**3 / (time.perf_counter() - start)


def seconds(macs: float, outline: Outline) -> float:
    """Time of a step: the products, half as much again for what lies between, and the files."""
    return 1.5 * macs / machine_speed() + outline.bytes / 2e8
