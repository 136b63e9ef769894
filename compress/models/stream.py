"""One block in memory at a time: weights stay in safetensors until they are needed."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from compress.errors import CompressError
from compress.models.anatomy import Anatomy, anatomy_of
from compress.models.experts import unfuse_all
from compress.models.loading import auto_class
from compress.system import memory
from compress.system.intake import reason


def build_meta(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build the model on the meta device: shapes without memory; experts are linears.

    Raises:
        CompressError: values in the config that its class cannot be built from.
    """
    cls = auto_class(config)
    try:
        with torch.device("meta"):
            model = cls.from_config(
                config, trust_remote_code=trust_remote_code, dtype=torch.float32
            )
    except CompressError:
        raise
    except Exception as error:  # constructors of 500 classes, each with assumptions of its own
        raise CompressError(
            f"a config that a model of type {config.model_type} can be built from",
            reason(error), "Correct config.json, or fetch it again",
        ) from error  # fmt: skip
    unfuse_all(model)
    return model.eval()


class StreamedModel:
    """A model on the meta device, and the means to fill and release its parts.

    Args:
        model: on the meta device (streamed) or real (live; filling and releasing then do nothing).
        tensors: where weights come from, an object with ``names()`` and ``get(name, dtype)``; None
            for a live model.
        device: where blocks are computed.
    """

    def __init__(
        self, model: PreTrainedModel, tensors: Any = None, device: torch.device | str = "cpu"
    ) -> None:
        self.model, self.tensors, self.device = model, tensors, torch.device(device)
        self.anatomy: Anatomy = anatomy_of(model)
        if not self.live:
            self._fill_block_buffers()

    @property
    def live(self) -> bool:
        return self.tensors is None

    def block(self, index: int) -> nn.Module:
        return self.model.get_submodule(self.anatomy.blocks[index].path)

    def outer_names(self) -> list[str]:
        """Names of stored tensors that belong to no block."""
        return [n for n in self.tensors.names() if self.anatomy.is_outer(n)]

    def fill_outer(self) -> None:
        """Give embeddings, norms and head their weights; buffers are recomputed by their class."""
        if self.live:
            return
        prefix = self.anatomy.prefix
        state = {n: self.tensors.get(n, torch.float32) for n in self.outer_names()}
        state = {n: t.to(self.device) for n, t in state.items()}
        load_outer(self.model, state, prefix)
        self._fill_buffers(prefix)

    def release_outer(self) -> None:
        """Return the outer parameters to the meta device."""
        if not self.live:
            for name, module in self.model.named_modules():
                if self.anatomy.is_outer(name + "."):
                    release(module, recurse=False)
            memory.trim()

    def release_block(self, index: int) -> None:
        """Return one block's parameters to the meta device, and their memory to the system."""
        if not self.live:
            release(self.block(index))
            memory.trim()

    def _fill_block_buffers(self) -> None:
        """Tables that blocks compute when they are made (GPT-J's positions) are in no file either.
        They are small and stay while blocks come and go."""
        whole = None
        for block in self.anatomy.blocks:
            for name, module in self.model.get_submodule(block.path).named_modules():
                owned = [
                    n
                    for n, b in module.named_buffers(recurse=False)
                    if b.is_meta and n in module._non_persistent_buffers_set
                ]
                if owned:
                    whole = whole or build_buffers(self.model)
                    fresh = whole.get_submodule(f"{block.path}.{name}".rstrip("."))
                    module._buffers |= {n: fresh._buffers[n].to(self.device) for n in owned}

    def _fill_buffers(self, prefix: str) -> None:
        """Non-persistent buffers (rotary frequencies, position ids) are not in any file: build the
        owning modules anew on the CPU and take theirs."""
        whole = None
        for name, module in self.model.named_modules():
            owned = [n for n, b in module.named_buffers(recurse=False) if b.is_meta]
            if not owned or (name + ".").startswith(prefix):
                continue
            fresh = rebuild(module, self.model.config)
            if fresh is None:
                # Gemma's embeddings carry a scale that only the code around them knows.
                whole = whole or build_buffers(self.model)
                fresh = whole.get_submodule(name)
            for buffer in owned:
                module._buffers[buffer] = fresh._buffers[buffer].to(self.device)
            for key, value in vars(fresh).items():
                # Rotary classes keep a second reference to their frequencies as an attribute.
                if isinstance(value, torch.Tensor):
                    setattr(module, key, value.to(self.device))


def rebuild(module: nn.Module, config: PreTrainedConfig) -> nn.Module | None:
    """Construct a fresh CPU instance of a parameter-free module from the model's config; None for a
    class that is made from something else."""
    accepted = inspect.signature(type(module).__init__).parameters
    if "config" not in accepted:
        return None
    with torch.device("cpu"):
        return type(module)(getattr(module, "config", config))


def build_buffers(model: PreTrainedModel) -> PreTrainedModel:
    """Build the model once more with real buffers, its parameters on the meta device."""
    from accelerate import init_empty_weights
    from transformers.monkey_patching import apply_patches

    with apply_patches(), init_empty_weights(include_buffers=False):
        made = type(model)(model.config)
    unfuse_all(made)
    return made


def release(module: nn.Module, recurse: bool = True) -> None:
    """Put a module's parameters back on the meta device, which frees their memory."""
    for m in module.modules() if recurse else [module]:
        for name, parameter in list(m._parameters.items()):
            if parameter is not None and not parameter.is_meta:
                m._parameters[name] = nn.Parameter(
                    parameter.data.to("meta"), requires_grad=parameter.requires_grad
                )
        for name in m._buffers:
            if m._buffers[name] is not None and name not in m._non_persistent_buffers_set:
                m._buffers[name] = m._buffers[name].to("meta")


def load_outer(model: PreTrainedModel, state: dict[str, torch.Tensor], prefix: str) -> None:
    """Assign outer tensors and restore ties; anything that stays on meta is an error.

    Raises:
        CompressError: the checkpoint lacks an outer tensor.
    """
    for name, tensor in state.items():
        owner_name, _, leaf = name.rpartition(".")
        try:
            owner = model.get_submodule(owner_name)
        except AttributeError:
            continue  # a tensor of another head than this class has
        if leaf in owner._parameters:
            if owner._parameters[leaf].shape != tensor.shape:
                raise CompressError(
                    f"{name} of shape {list(owner._parameters[leaf].shape)} as config.json says",
                    f"{list(tensor.shape)}",
                    "The config and the weights belong to different models",
                )
            owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        elif leaf in owner._buffers:
            owner._buffers[leaf] = tensor
    model.tie_weights()
    missing = [n for n, p in model.named_parameters() if p.is_meta and not n.startswith(prefix)]
    if missing:
        raise CompressError(
            "weights for every layer of the model",
            f"none for {', '.join(missing[:3])}",
            "The checkpoint is incomplete or of another architecture than config.json says",
        )
