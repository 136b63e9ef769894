"""diffusers' ``UVit2DModel`` (aMUSEd) in the clothes of a transformers model.

It is a masked generative transformer between convolutions (Patil et al. 2024, "aMUSEd", arXiv
2401.01808). Its class knows nothing of transformers' configs, so an adapter stands in for it while
steps run; the modules are the original's, and change in place. Only what leaves shapes alone can be
stored: diffusers builds all layers from one config and has no reader for low rank or quantised
weights. The package diffusers is optional (extra ``diffusion``).
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from compress.errors import CompressError
from compress.linear.layer import is_layer
from compress.linear.quantized import scheme_of
from compress.system.tensors import check_finite
from compress.system.version import DISTRIBUTION

CLASS = "UVit2DModel"
MODEL_TYPE = "uvit2d"
INPUTS = ("input_ids", "encoder_hidden_states", "pooled_text_emb", "micro_conds")
# As methods declare what they write: the width and depth of all layers are one config's.
_NOT_WRITTEN = {"width", "depth"}


class UVit2DConfig(PreTrainedConfig):
    """The fields of the diffusers config under a model type."""

    model_type = MODEL_TYPE


class UVit2DAdapter(PreTrainedModel):
    """A live ``UVit2DModel`` as a transformers model; shares its modules, owns nothing.

    Args:
        model: stays usable by itself.
    """

    config_class = UVit2DConfig
    base_model_prefix = "model"

    def __init__(self, model: nn.Module) -> None:
        fields = {k: v for k, v in dict(model.config).items() if not k.startswith("_")}
        super().__init__(UVit2DConfig(**fields))
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_text_emb: torch.Tensor,
        micro_conds: torch.Tensor,
        number: torch.Tensor | None = None,
    ) -> SimpleNamespace:
        """Return logits [batch, codes, height, width]; ``number`` is only for :func:`numbered`."""
        logits = self.model(input_ids, encoder_hidden_states, pooled_text_emb, micro_conds)
        return SimpleNamespace(logits=logits)


def is_diffusion_model(model: Any) -> bool:
    """True for an instance of diffusers' class; imports nothing."""
    return any(
        cls.__name__ == CLASS and cls.__module__.startswith("diffusers.")
        for cls in type(model).__mro__
    )


def adapted(model: Any) -> Any:
    """Return the adapter of a diffusers model, and any other object as it is."""
    return UVit2DAdapter(model) if is_diffusion_model(model) else model


def numbered(batches: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """Tell batches apart by a first tensor whose shape is the batch's number.

    A replay lets batches of one shape share the arguments that blocks are called with. That holds
    for positions and masks, and not for the conditioning here, which is each batch's own.

    Raises:
        CompressError: a batch without one of the model's four inputs.
    """
    for batch in batches:
        missing = [name for name in INPUTS if name not in batch]
        if missing:
            raise CompressError(
                f"calibration batches with {', '.join(INPUTS)}", f"none with {missing[0]}",
                "Give compress.apply a list of dicts of these tensors",
            )  # fmt: skip
    return [{"number": torch.empty(0, i), **batch} for i, batch in enumerate(batches)]


def refusal(method: Any) -> CompressError | None:
    """Return why a method (class or instance) cannot work on such a model, None if it can."""
    wrong = sorted(_NOT_WRITTEN & method.writes)
    if not wrong:
        return None
    return CompressError(
        f"steps that leave the shapes of {CLASS} as they are",
        f"{method.name}, which changes its {wrong[0]}",
        "Use a sparsity, precision or low-rank step: diffusers builds all layers alike",
    )


def is_diffusion_folder(folder: Path) -> bool:
    """True for a folder that diffusers wrote a ``UVit2DModel`` to."""
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(fields, dict) and fields.get("_class_name") == CLASS


def build_diffusion(folder: Path) -> nn.Module:
    """Build the ``UVit2DModel`` of a folder on the meta device: shapes without memory."""
    cls = _diffusers_class(folder)
    with torch.device("meta"):
        return cls.from_config(cls.load_config(folder)).eval()


def load_diffusion(
    folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> nn.Module:
    """Load a ``UVit2DModel`` in evaluation mode from a folder that diffusers wrote.

    Raises:
        CompressError: diffusers is not installed, weights are missing, of another shape or not
            finite.
    """
    cls = _diffusers_class(folder)
    try:
        model, info = cls.from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True,
            output_loading_info=True, low_cpu_mem_usage=False,
        )  # fmt: skip
    except (OSError, RuntimeError, ValueError) as error:
        raise CompressError(
            f"a {CLASS} that loads from {folder}", f"{type(error).__name__}: {error}",
            "The config and the weights may be of two different models",
        ) from error  # fmt: skip
    if info["missing_keys"]:
        raise CompressError(
            f"every weight of the model in {folder}",
            f"{len(info['missing_keys'])} missing: {', '.join(sorted(info['missing_keys'])[:3])}",
            "The config and the weights are of two different models",
        )
    for name, parameter in model.named_parameters():
        check_finite(name, parameter.detach(), where=str(folder))
    return model.to(device).eval()


def _diffusers_class(folder: Path) -> Any:
    try:
        from diffusers import UVit2DModel
    except ImportError as error:
        raise CompressError(
            f"the package diffusers, which {folder} needs", str(error),
            f"Install it: pip install '{DISTRIBUTION}[diffusion]'",
        ) from error  # fmt: skip
    return UVit2DModel


def save_diffusion(model: nn.Module, folder: Path) -> None:
    """Write a ``UVit2DModel`` the way diffusers does, so that its pipelines read it.

    Raises:
        CompressError: the model holds modules that diffusers cannot load.
    """
    for name, module in model.named_modules():
        if is_layer(module) or scheme_of(module) is not None:
            raise CompressError(
                "plain linears, the only ones that diffusers can load",
                f"a {type(module).__name__} at {name}",
                "Save models after sparsity steps; low rank and precision are for measuring what "
                "they would cost",
            )
    model.save_pretrained(folder, safe_serialization=True)
