"""What a step takes: multiply-accumulates, peak memory, disk, seconds on this machine.

Predictions from an outline alone. Work is counted, memory is what the engine holds at once, and
seconds follow from a measurement of this machine in the types that are computed in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from compress.linear.statistics import holds_gram, statistics_bytes
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
    each_once,
    merged,
    sites_of,
    together,
    unrolled,
    uses_original,
)
from compress.models.anatomy import OTHER, Site
from compress.models.outline import BlockOutline, LinearOutline, Outline
from compress.planning.activations import LOGITS, batch_bytes, learning_bytes, training_bytes
from compress.system.precision import product_speed
from compress.train.options import compute_dtype

if TYPE_CHECKING:
    from compress.data.calibration_spec import CalibrationSpec

# Code and buffers of libraries that are loaded when they are first called: 67 MB measured around a
# first small step on two threads.
_LIBRARIES = 96 * 2**20


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
    steps = unrolled(method.passes(), len(outline.blocks))
    targeted = _targeted(steps, outline)
    solving = sum(target.action.work(target.shapes) for target in targeted)
    if method.needs == "nothing" or calibration is None:
        return Work(solving=solving)
    tokens = calibration.samples * calibration.length
    forward = sum(x.weights for b in outline.blocks for x in b.linears.values())
    attention = sum(
        b.anatomy.heads * b.anatomy.head_dim * calibration.length for b in outline.blocks
    )
    forwards = heads = 0.0
    for step in steps:
        if isinstance(step, Whole):
            forwards, heads = forwards + step.forwards(outline), heads + step.heads(outline)
        elif isinstance(step, Survey):
            detours = len(outline.blocks) / 2 if step.detours else 0
            forwards += (1 + detours + step.forwards) * _seen(step.batches, calibration)
        elif isinstance(step, Stream) and step.inputs:
            # What blocks are to return is made by as many again.
            again = sum(1 + a.forwards for a in step.learning)
            worked = step.share(len(outline.blocks)) * again
            forwards += (1 + worked) * _seen(step.batches, calibration)
    # Only the upper triangle is computed, in panels.
    grams = sum(0.6 * width**2 for target in targeted for width in target.statistics.grams)
    for step in steps:
        if isinstance(step, Survey):
            held = (s for block in outline.blocks for s in _surveyed(step, block))
            grams += sum(0.6 * width**2 for statistics in held for width in statistics.grams)
    in_batch = calibration.batch * calibration.length
    by_block = sum(
        step.share(len(outline.blocks)) * a.options.steps * a.options.batch * in_batch
        for step in steps
        if isinstance(step, Stream)
        for a in step.learning
        if a.options
    )
    by_model = sum(
        round(o.steps * o.batch * calibration.length * passes)
        for step in steps
        if isinstance(step, TrainModel)
        for o, passes in step.options
    )
    # A backward pass costs two forward passes.
    learning = 3.0 * (by_block + by_model) * (forward + attention)
    learning += 3.0 * by_model * outline.head_weights
    products = forwards * (forward + attention) + grams + heads * outline.head_weights
    return Work(tokens * products, learning, solving)


def _seen(batches: int | None, calibration: CalibrationSpec) -> float:
    """The share of the calibration sequences that a pass over so many batches sees."""
    if batches is None:
        return 1.0
    return min(1.0, batches * calibration.batch / calibration.samples)


def learning_dtype(method: Method, device: torch.device) -> torch.dtype:
    """Type of the matrix products of a step's trainings."""
    steps = tuple(each_once(method.passes()))
    options = [o for step in steps if isinstance(step, TrainModel) for o, _ in step.options]
    options += [action.options for action in _learning(steps) if action.options]
    return compute_dtype(options[0].precision if options else "float32", device)


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
    targeted = _targeted(unrolled(method.passes(), len(outline.blocks)), outline)
    widths = [width for target in targeted for width in target.statistics.grams]
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
    shapes = [shape for block in outline.blocks for shape in _matrices(block)]
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
    for target in _targeted(passes, outline):
        own = target.statistics.bytes
        statistics = max(statistics, own)
        solving = target.action.memory(target.shapes, bool(target.statistics.grams))
        site_bytes = max(site_bytes, own + solving)
    for step in passes:
        if isinstance(step, Survey):
            # Those of all sites of a block are there when it is observed.
            held = [sum(s.bytes for s in _surveyed(step, block)) for block in outline.blocks]
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
            learning = most * max(action.memory(_matrices(block)) for block in outline.blocks)
            kept = learning_bytes(action, outline, calibration, most)
            site_bytes = max(site_bytes, learning + kept)
    return max(moved, outer + batch, block + cast + statistics + batch, block + site_bytes)


@dataclass(frozen=True)
class _Statistics:
    """Statistics of the inputs of linears of a site.

    Attributes:
        kind: as methods name it.
        widths: of the inputs that differ: one in a site whose linears share it.
        derivable: for parts of a layer too.
    """

    kind: str
    widths: tuple[int, ...]
    derivable: bool

    @classmethod
    def of(cls, kind: str, site: Site, linears: list[LinearOutline]) -> _Statistics:
        widths = tuple(x.in_features for x in linears)
        own = widths if site.kind == OTHER else (max(widths),)
        return cls(kind, own, any(x.layer for x in linears))

    @property
    def bytes(self) -> int:
        return sum(statistics_bytes(self.kind, width, self.derivable) for width in self.widths)

    @property
    def grams(self) -> tuple[int, ...]:
        """Widths of the Gram matrices."""
        return self.widths if holds_gram(self.kind, self.derivable) else ()


@dataclass(frozen=True)
class _Target:
    """What is done to a site, (out, in) of the linears there, and what must be known of them."""

    action: Sites
    shapes: Shapes
    statistics: _Statistics


def _targeted(passes: tuple[Pass, ...], outline: Outline) -> list[_Target]:
    found = []
    for action in sites_of(passes):
        for block in outline.blocks:
            for site in block.anatomy.sites:
                linears = [block.linears[name] for name in action.targets(block.anatomy, site)]
                if linears:
                    shapes = [(x.out_features, x.in_features) for x in linears]
                    statistics = _Statistics.of(action.statistic(site), site, linears)
                    found.append(_Target(action, shapes, statistics))
    return found


def _surveyed(survey: Survey, block: BlockOutline) -> list[_Statistics]:
    """What a survey collects of a block."""
    return [
        _Statistics.of(survey.statistic(site), site, [block.linears[n] for n in site.linears])
        for site in block.anatomy.sites
    ]


def _learning(passes: tuple[Pass, ...]) -> list[Learn]:
    return [action for step in passes if isinstance(step, Stream) for action in step.learning]


def _matrices(block: BlockOutline) -> Shapes:
    """(out, in) of all matrices of a block, those that layers are made of among them."""
    return [shape for linear in block.linears.values() for shape in linear.roundable]


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
                states = 4 * tokens * outline.hidden_size * _seen(step.batches, calibration)
                # In front of the last block and behind it.
                largest = max(largest, 2 * len(outline.blocks) * states)
    return kept + round(largest)
