"""What a live model must be before it is compressed or saved: everything that can be refused is
refused here, while nothing has changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from compress.checkpoint.save import tied_names
from compress.errors import CompressError
from compress.models.anatomy import find_blocks
from compress.models.diffusion import CLASS, is_diffusion_model
from compress.models.supported import check_kind, check_not_packed, check_own_weights
from compress.system.tensors import check_finite

# What float32 solvers can be run for: the result is rounded to the model's own type.
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_live(model: Any, purpose: str) -> None:
    """Refuse an object that is no live model of ours, before anything is done with it.

    Args:
        purpose: for the message, as in "to compress".

    Raises:
        CompressError: no transformers model (nor a ``UVit2DModel`` of diffusers), one inside a
            wrapper (torch.compile, PEFT, DDP), of a kind or task that the toolkit does not handle,
            quantised by transformers, on the meta device or on several devices, made in inference
            mode, in floats that are not computed with, with layers that share weights, with a
            weight of its own where the config ties it to another, or with NaN or infinite values.
    """
    _check_kind(model, purpose)
    _check_storage(model, purpose)
    if isinstance(model, PreTrainedModel):
        check_own_weights(model, f"{find_blocks(model)[0]}.")
        tied_names(model)  # raises where a head of its own would be lost
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            check_finite(name, tensor.detach(), where=type(model).__name__)


def check_model_class(model: Any, purpose: str) -> None:
    """Refuse what is neither a transformers model nor one of diffusers that can be handled.

    Raises:
        CompressError: naming what to give instead.
    """
    if isinstance(model, PreTrainedModel) or is_diffusion_model(model):
        return
    fix = "Load one with compress.load or transformers' from_pretrained"
    if isinstance(model, (str, Path)):
        fix = f"Load it first: model, tokenizer = compress.load({str(model)!r})"
    elif hasattr(model, "_orig_mod"):
        fix = (
            "Give the model that torch.compile was called on (model._orig_mod), compile the result"
        )
    elif hasattr(model, "merge_and_unload"):
        fix = "Merge the adapter first: model = model.merge_and_unload()"
    elif isinstance(getattr(model, "module", None), nn.Module):
        fix = "Give the model inside the wrapper (model.module)"
    kind = f"{type(model).__module__}.{type(model).__name__}"
    raise CompressError(
        f"a transformers model (or {CLASS} of diffusers) {purpose}", f"a {kind}", fix
    )


def _check_kind(model: Any, purpose: str) -> None:
    check_model_class(model, purpose)
    for name, module in model.named_modules():
        if type(module).__module__.startswith("peft."):
            raise CompressError(
                f"a model without adapters {purpose}", f"{type(module).__name__} at {name}",
                "Merge the adapter first: model = peft_model.merge_and_unload()",
            )  # fmt: skip
    if isinstance(model, PreTrainedModel):
        check_kind(model)
        check_not_packed(model)


def _check_storage(model: nn.Module, purpose: str) -> None:
    devices = {p.device for p in model.parameters()}
    if any(device.type == "meta" for device in devices):
        raise CompressError(
            f"a model with its weights in memory {purpose}", "parameters on the meta device",
            "Load the weights (from_pretrained without device_map), or use a recipe, which needs "
            "one block in memory at a time",
        )  # fmt: skip
    if len(devices) > 1:
        raise CompressError(
            f"a model on one device {purpose}", ", ".join(sorted(map(str, devices))),
            "Load it without device_map, or use a recipe",
        )  # fmt: skip
    if any(p.is_inference() for p in model.parameters()):
        raise CompressError(
            f"a model that was not made under torch.inference_mode() {purpose}",
            "inference tensors, which cannot change",
            "Load it outside",
        )
    others = {p.dtype for p in model.parameters() if p.is_floating_point()} - set(_FLOATS)
    if others:
        raise CompressError(
            f"weights in float32, bfloat16 or float16 {purpose}",
            ", ".join(sorted(str(d).removeprefix("torch.") for d in others)),
            "Convert it first: model.to(torch.bfloat16)",
        )
