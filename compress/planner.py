"""Recipe + headers of a checkpoint -> plan: what will happen, what it costs, or why it cannot work.

No weight is read. Sizes follow from shapes; :mod:`compress.forecast` says what steps take.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from compress import forecast
from compress.errors import CompressError
from compress.memory import resident
from compress.methods.base import MODULES, PRECISION, VALUES, WIDTH, ZEROS, Method
from compress.models.anatomy import Anatomy
from compress.models.source import Source, load_config, resolve
from compress.models.stream import StreamedModel
from compress.models.supported import check_kind
from compress.models.tensors import TensorIndex
from compress.outline import Outline, outline_of
from compress.planning_checks import check_inputs, check_patterns
from compress.precision import calibration_dtype, device_of
from compress.recipe import Recipe, split_evaluation
from compress.state import ModelState
from compress.step_check import check_step, left_alone

# What an earlier step made, a later one would destroy: (earlier writes, later writes, why).
_CONFLICTS = (
    (PRECISION, VALUES, "would change weights that are rounded already"),
    (PRECISION, WIDTH, "would cut the groups of weights that are rounded already"),
    (PRECISION, MODULES, "would replace weights that are rounded already"),
    (ZEROS, MODULES, "would fill the zeros again"),
)


@dataclass(frozen=True)
class PlannedStep:
    """One step: the model before and after it, and what it takes.

    Attributes:
        macs: multiply-accumulates of all forward passes and statistics.
        peak_bytes: highest resident memory, this process's base included.
        seconds: predicted on this machine.
    """

    method: Method
    before: Outline
    after: Outline
    macs: float
    peak_bytes: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What a run will do. ``steps`` are in order; ``warnings`` are sentences."""

    recipe: Recipe
    source: Source
    state: ModelState
    anatomy: Anatomy
    steps: tuple[PlannedStep, ...]
    original: Outline
    evaluation_bytes: int
    warnings: tuple[str, ...]

    @property
    def disk_bytes(self) -> int:
        """Room that the run's folder needs: finished blocks, activations, the checkpoint."""
        if not self.steps:
            return 0
        blocks = sum(s.after.bytes for s in self.steps) if self.steps else 0
        observed = any(s.method.needs != "nothing" for s in self.steps)
        calibration = self.recipe.calibration if observed else None
        activations = forecast.activation_bytes(self.original, calibration)
        return blocks + self.result.bytes + activations

    @property
    def result(self) -> Outline:
        return self.steps[-1].after if self.steps else self.original

    @property
    def peak_bytes(self) -> int:
        return max([self.evaluation_bytes, *(s.peak_bytes for s in self.steps)])

    @property
    def seconds(self) -> float:
        return sum(s.seconds for s in self.steps)


def plan(
    recipe: Recipe,
    *,
    max_memory: int | None = None,
    cache_dir: str | Path | None = None,
    trained: Source | None = None,
    data_root: str | Path | None = None,
) -> Plan:
    """Check a recipe against a model's headers and predict what it will do.

    Args:
        recipe: parsed.
        max_memory: bytes of resident memory that the run may use; what is free if None.
        cache_dir: where fetched models are kept.
        trained: the model that the recipe trains, once it is; a model of its shape if None.
        data_root: folder with local copies of data sets.

    Raises:
        CompressError: wrong order, a step that this family or these widths do not support, patterns
            that match nothing, data or tasks that do not exist, lengths beyond the model's
            positions, or more memory than allowed.
    """
    source = trained or _source(recipe, cache_dir)
    config = load_config(source.folder, trust_remote_code=recipe.model.trust_remote_code)
    state = ModelState.of_checkpoint(
        TensorIndex.open(source.folder), config, recipe.model.trust_remote_code
    )
    streamed = state.streamed()
    check_kind(streamed.model)
    bits = 8 * (getattr(torch, recipe.output.dtype) if recipe.output.dtype else
                state.source.storage_dtype).itemsize  # fmt: skip
    outline = _mark_quantized(outline_of(streamed.model, streamed.anatomy, bits), state)
    original = outline
    _check_needs(recipe.steps, recipe.calibration is not None)
    _check_order(recipe.steps)
    notes = check_inputs(recipe, source.folder, streamed.model, data_root)
    device = device_of(recipe.device)
    compute = calibration_dtype(recipe.compute, device)
    steps, base = [], resident()
    for number, method in enumerate(recipe.steps):
        after = _passed(number, method, streamed, outline)
        work = forecast.work(method, outline, recipe.calibration)
        peak = base + forecast.peak_bytes(method, outline, recipe.calibration, compute)
        seconds = work.seconds(outline, compute, method.learning_dtype(device))
        steps.append(PlannedStep(method, outline, after, work.macs, peak, seconds))
        outline = after
    made = Plan(
        recipe, source, state, streamed.anatomy, tuple(steps), original,
        _evaluation_bytes(recipe, original, outline),
        (*_warnings(recipe, original, outline, state.source.unused), *notes),
    )  # fmt: skip
    limit = psutil.virtual_memory().available if max_memory is None else max_memory
    if made.peak_bytes > limit:
        raise _too_large(made, limit, "what this machine has free" if max_memory is None else "")
    return made


def _source(recipe: Recipe, cache_dir: str | Path | None) -> Source:
    if recipe.model.train is not None:
        from compress.create.create import draft

        return draft(recipe.model.train, cache_dir)
    return resolve(
        recipe.model.source,
        revision=recipe.model.revision,
        cache_dir=cache_dir,
        trust_remote_code=recipe.model.trust_remote_code,
    )


def _mark_quantized(outline: Outline, state: ModelState) -> Outline:
    """A source that is quantised already must not be quantised twice."""
    blocks = []
    for block, record in zip(outline.blocks, state.records, strict=True):
        changed = {
            name: replace(linear, quantized=True, bits=float(record.quantization[name].bits))
            for name, linear in block.linears.items()
            if name in record.quantization
        }
        blocks.append(block.with_linears(changed))
    return replace(outline, blocks=tuple(blocks))


def check_steps(steps: tuple[Method, ...], streamed: StreamedModel, has_calibration: bool) -> None:
    """Refuse steps that cannot work on a live model, before any of them starts.

    Warns of what they leave alone.

    Raises:
        CompressError: as :func:`plan`.
    """
    check_kind(streamed.model)
    _check_needs(steps, has_calibration)
    _check_order(steps)
    outline = outline_of(streamed.model, streamed.anatomy, 32)
    for number, method in enumerate(steps):
        note = left_alone(method, outline)
        if note:
            warnings.warn(note, stacklevel=3)
        outline = _passed(number, method, streamed, outline)


def _passed(number: int, method: Method, streamed: StreamedModel, outline: Outline) -> Outline:
    """The outline behind a step: the one check of recipes and live models."""
    try:
        after = check_step(method, streamed, outline)
        check_patterns(method, streamed.anatomy, streamed.model)
        _check_rounded(method, outline)
        return after
    except CompressError as error:
        raise error.within(f"steps.{number} ({method.name})") from None


def _check_rounded(method: Method, outline: Outline) -> None:
    """Refuse to change weights that were rounded before the first step."""
    reasons = [why for made, touched, why in _CONFLICTS
               if made == PRECISION and touched in method.writes]  # fmt: skip
    if not reasons or PRECISION in method.writes:
        return  # a quantiser looks at each layer itself
    for block in outline.blocks:
        for site in block.anatomy.sites:
            for name in method.targets(block.anatomy, site):
                if block.linears[name].quantized:
                    raise CompressError(
                        "layers in floating point",
                        f"{block.anatomy.path}.{name}, which is quantised: {method.name} "
                        f"{reasons[0]}",
                        "Start from the model before it was quantised",
                    )


def _check_needs(steps: tuple[Method, ...], has_calibration: bool) -> None:
    for number, method in enumerate(steps):
        if method.needs == "calibration" and not has_calibration:
            raise CompressError(
                "calibration inputs",
                f"none, and steps.{number} ({method.name}) observes the model's inputs",
                "In a recipe, add `calibration: {text: {source: FILE or data set}, samples: 128, "
                "length: 512}`; in Python, give compress.apply token ids as `calibration`; "
                "or use a method that needs no data (magnitude, rtn)",
            )


def _check_order(steps: tuple[Method, ...]) -> None:
    """Refuse orders in which a step destroys what an earlier one made."""
    for late, method in enumerate(steps):
        for early in range(late):
            earlier = steps[early]
            for made, touched, why in _CONFLICTS:
                if made not in earlier.writes or touched not in method.writes:
                    continue
                if PRECISION in method.writes and made == PRECISION:
                    continue  # two quantisers may share out the layers; each layer is checked
                raise CompressError(
                    "steps in an order in which none undoes another",
                    f"steps.{early} ({earlier.name}) before steps.{late} ({method.name}), which "
                    f"{why}",
                    f"Put {method.name} before {earlier.name}; the order that works is depth, "
                    "width, low rank, zeros, precision",
                )


def _evaluation_bytes(recipe: Recipe, original: Outline, result: Outline) -> int:
    """Resident memory of the evaluation, 0 without one."""
    if recipe.evaluation is None:
        return 0
    _, spec = split_evaluation(recipe.evaluation)
    models = 4 * original.parameters
    if spec.latency_spec() is not None and recipe.steps:
        models += 4 * result.parameters
    return resident() + models + 4 * 1024 * (8 * original.hidden_size + 8192)


def _warnings(
    recipe: Recipe, original: Outline, result: Outline, unused: Sequence[str]
) -> tuple[str, ...]:
    found = list(result.notes)
    if recipe.model.train is not None:
        training = recipe.model.train.training
        found.append(
            f"the model is trained first: {training.steps} steps of {training.batch} sequences"
        )
    if recipe.model.trust_remote_code:
        found.append("code that comes with the checkpoint will be run (trust_remote_code)")
    if unused:
        found.append(
            f"{len(unused)} weights of the checkpoint belong to no part of the model and are left "
            f"out ({', '.join(unused[:3])})"
        )
    if recipe.evaluation is None and recipe.steps:
        found.append("no evaluation section: the report will not say what the result is worth")
    if recipe.steps and result.bytes >= original.bytes and result.nonzero == original.nonzero:
        found.append("the steps change neither size nor number of weights")
    return tuple(found)


def _too_large(made: Plan, limit: int, why: str) -> CompressError:
    parts = [f"{s.method.name} {s.peak_bytes / 1e9:.2f} GB" for s in made.steps]
    if made.evaluation_bytes:
        parts.append(f"evaluation {made.evaluation_bytes / 1e9:.2f} GB")
    return CompressError(
        f"a run within {limit / 1e9:.2f} GB of resident memory ({why or '--max-memory'})",
        f"predicted peaks of {', '.join(parts)}",
        "Lower calibration.length or calibration.batch, turn evaluation.latency off or leave the "
        "evaluation out, choose a method of block scope, or raise the limit",
    )


def describe(made: Plan) -> list[dict[str, Any]]:
    """The plan as rows: step, parameters, non-zero, bytes, effective bits, peak memory, seconds."""
    rows = [_row("original", made.original, None)]
    rows += [_row(s.method.name, s.after, s) for s in made.steps]
    return rows


def _row(name: str, outline: Outline, step: PlannedStep | None) -> dict[str, Any]:
    return {
        "step": name,
        "parameters": outline.parameters,
        "nonzero": outline.nonzero,
        "bytes": outline.bytes,
        "effective_bits": outline.effective_bits,
        "macs_per_token": outline.macs_per_token,
        "peak_bytes": step.peak_bytes if step else None,
        "seconds": step.seconds if step else None,
    }
