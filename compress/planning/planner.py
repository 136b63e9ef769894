"""Recipe + headers of a checkpoint -> plan: what will happen, what it costs, or why it cannot work.

No weight is read. Sizes follow from shapes; :mod:`compress.planning.forecast` says what steps take
of memory and disk, :mod:`compress.planning.workload` how long they take.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from compress.checkpoint.embeddings import read_embeddings
from compress.checkpoint.export import foreign_links
from compress.checkpoint.state import ModelState
from compress.data.calibration_spec import CalibrationSpec
from compress.errors import CompressError
from compress.methods.base import Method
from compress.methods.questions import merged
from compress.models.anatomy import Anatomy, stock_type
from compress.models.described import attach
from compress.models.images import image_shape, image_tokens, reads_images
from compress.models.outline import Outline, outline_of
from compress.models.sources.source import Source, load_config, resolve
from compress.models.supported import check_kind
from compress.planning import forecast, workload
from compress.planning.checks import check_inputs
from compress.planning.export_check import check_exports
from compress.planning.order import check_needs, check_order
from compress.planning.recipe import Recipe, split_evaluation
from compress.planning.step_check import passed
from compress.system.memory import available, resident
from compress.system.precision import calibration_dtype, device_of
from compress.system.tensors import TensorIndex


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
        """Room that the run's folder needs: finished blocks, activations, checkpoint, exports."""
        if not self.steps:
            return 0
        blocks = sum(s.after.bytes for s in self.steps) if self.steps else 0
        observed = any(s.method.needs != "nothing" for s in self.steps)
        calibration = _observed(self.recipe, self.state.config) if observed else None
        most = max(merged(s.method.passes()) for s in self.steps)
        activations = forecast.activation_bytes(self.original, calibration, most)
        kept = sum(
            forecast.training_disk_bytes(s.method, calibration)
            + forecast.survey_disk_bytes(s.method, s.before, calibration)
            for s in self.steps
        )
        exported = self.result.bytes * len(self.recipe.output.exports)
        return round(blocks + self.result.bytes + exported + activations + kept)

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
        CompressError: wrong order, schemes that no one checkpoint can have, a step that this family
            or these widths do not support, patterns that match nothing, data or tasks that do not
            exist, lengths beyond the model's positions, or more memory than allowed.
    """
    source = trained or _source(recipe, cache_dir)
    config = load_config(source.folder, trust_remote_code=recipe.model.trust_remote_code)
    attach(config, stock_type(config), recipe.model.family)
    state = ModelState.of_checkpoint(
        TensorIndex.open(source.folder), config, recipe.model.trust_remote_code
    )
    streamed = state.streamed()
    check_kind(streamed.model)
    bits = 8 * (getattr(torch, recipe.output.dtype) if recipe.output.dtype else
                state.source.storage_dtype).itemsize  # fmt: skip
    outline = _mark_quantized(outline_of(streamed.model, streamed.anatomy, bits), state)
    original = outline
    check_needs(recipe.steps, recipe.calibration is not None)
    check_order(recipe.steps, {s for record in state.records for s in record.quantization.values()})
    notes = check_inputs(recipe, source.folder, streamed.model, data_root)
    device = device_of(recipe.device)
    compute = calibration_dtype(recipe.compute, device)
    calibration = _observed(recipe, config)
    steps = []
    for number, method in enumerate(recipe.steps):
        after = passed(number, method, streamed, outline)
        done = workload.work(method, outline, calibration, compute)
        peak = forecast.peak_bytes(method, outline, calibration, compute, original)
        seconds = done.seconds(compute, workload.learning_dtype(method, device))
        steps.append(PlannedStep(method, outline, after, done.macs, peak, seconds))
        outline = after
    # What planning itself has loaded stays in this process: looked at when it is done.
    base = resident() + _held_images(calibration, config)
    steps = [replace(step, peak_bytes=base + step.peak_bytes) for step in steps]
    check_exports(recipe, streamed.model, streamed.anatomy, [(s.method, s.after) for s in steps])
    made = Plan(
        recipe, source, state, streamed.anatomy, tuple(steps), original,
        _evaluation_bytes(recipe, original, outline),
        (*_warnings(recipe, original, outline, state.source.unused), *_left_out(recipe, source),
         *notes),
    )  # fmt: skip
    limit = available() if max_memory is None else max_memory
    if made.peak_bytes > limit:
        raise _too_large(made, limit, "what this machine has free" if max_memory is None else "")
    return made


def _source(recipe: Recipe, cache_dir: str | Path | None) -> Source:
    if recipe.model.train is not None:
        from compress.train.create.create import draft

        return draft(recipe.model.train, cache_dir)
    return resolve(
        recipe.model.source,
        revision=recipe.model.revision,
        cache_dir=cache_dir,
        trust_remote_code=recipe.model.trust_remote_code,
    )


def _observed(recipe: Recipe, config: PreTrainedConfig) -> CalibrationSpec | None:
    """What the model sees, in the tokens that blocks get: of an image as many as it has patches."""
    if recipe.calibration is None or not reads_images(config):
        return recipe.calibration
    return recipe.calibration.model_copy(update={"length": image_tokens(config)})


def _held_images(calibration: CalibrationSpec | None, config: PreTrainedConfig) -> int:
    """Bytes of the pixel values that a run holds; token ids are next to nothing."""
    if calibration is None or not reads_images(config):
        return 0
    return 4 * calibration.samples * math.prod(image_shape(config))


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
    rounded = [scheme.bits for scheme in read_embeddings(state.config).values()]
    bits = float(max(rounded)) if rounded else None
    return replace(outline, blocks=tuple(blocks), table_bits=bits)


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


def _left_out(recipe: Recipe, source: Source) -> Iterator[str]:
    links = foreign_links(source, recipe.model.trust_remote_code)
    if recipe.steps and links:
        yield (
            f"{', '.join(links)} will not be copied into the result: links that lead out of the "
            "model's folder are not followed; put the files there in their place"
        )


def _too_large(made: Plan, limit: int, why: str) -> CompressError:
    parts = [f"{s.method.name} {s.peak_bytes / 1e9:.2f} GB" for s in made.steps]
    if made.evaluation_bytes:
        parts.append(f"evaluation {made.evaluation_bytes / 1e9:.2f} GB")
    return CompressError(
        f"a run within {limit / 1e9:.2f} GB of resident memory ({why or '--max-memory'})",
        f"predicted peaks of {', '.join(parts)}",
        "Lower calibration.length, calibration.batch or a training's micro_batch, turn "
        "evaluation.latency off or leave the evaluation out, choose a method of block scope, or "
        "raise the limit",
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
