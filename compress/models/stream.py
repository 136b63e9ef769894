"""One block in memory at a time: weights stay in safetensors until they are needed."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from compress.errors import CompressError
from compress.models.anatomy import Anatomy, anatomy_of
from compress.models.experts import unfuse_all
from compress.models.loading import auto_class
from compress.models.replay import BlockCall
from compress.system import memory
from compress.system.activations import Activations
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


class _Captured(Exception):
    """Ends a model's forward once its first block has been called."""


def capture_inputs(
    model: PreTrainedModel,
    anatomy: Anatomy,
    batches: Iterable[dict[str, torch.Tensor]],
    inputs: Activations,
) -> list[list[BlockCall]]:
    """Embed all batches and learn how the model calls its blocks.

    Writes the hidden states that enter the first block to ``inputs``.

    Returns:
        calls[block][batch]. Batches of one tensor that have one shape share the argument objects.
    """
    blocks = [model.get_submodule(b.path) for b in anatomy.blocks]
    calls: list[list[BlockCall]] = [[] for _ in blocks]
    by_shape: dict[tuple[int, ...], list[BlockCall]] = {}
    for index, batch in enumerate(batches):
        # Masks and conditions reach the blocks as arguments: only what is all shape is shared.
        alone = len(batch) == 1
        shape = tuple(next(iter(batch.values())).shape) if alone else (index,)
        first_time = shape not in by_shape
        recorded: list[BlockCall] = []
        recording = _recording(blocks, recorded, inputs, index, every=first_time)
        with torch.no_grad(), recording, contextlib.suppress(_Captured):
            _forward(model, batch)
        if first_time:
            by_shape[shape] = recorded
            _note_padding(recorded, batch.get("attention_mask"), recording.shape)
        for position, call in enumerate(by_shape[shape]):
            calls[position].append(call)
    return calls


def _note_padding(
    calls: list[BlockCall], mask: torch.Tensor | None, hidden: tuple[int, ...]
) -> None:
    """Tell the calls of a batch which of the hidden states [batch, length, ...] are padding."""
    if mask is None or tuple(mask.shape) != tuple(hidden[:2]) or bool((mask != 0).all()):
        return
    for call in calls:
        call.real = mask != 0


class _recording:
    """Stubs all blocks of a model: the first stores its input, each notes its arguments."""

    def __init__(self, blocks, recorded, inputs, index, every: bool) -> None:
        self.blocks, self.recorded, self.inputs = blocks, recorded, inputs
        self.index, self.every = index, every
        self.shape: tuple[int, ...] = ()  # of the hidden states that enter the first block

    def __enter__(self) -> None:
        for position, block in enumerate(self.blocks):
            block.forward = self._stub(position, inspect.signature(type(block).forward))

    def __exit__(self, *_exc: object) -> None:
        for block in self.blocks:
            del block.forward

    def _stub(self, position: int, signature: inspect.Signature):
        first_name = list(signature.parameters)[1]

        def stub(*args: Any, **kwargs: Any) -> Any:
            if args:
                call = BlockCall(args[1:], kwargs)
                hidden = args[0]
            else:
                hidden = kwargs.pop(first_name)
                call = BlockCall((), kwargs, first_name)
            if position == 0:
                self.shape = tuple(hidden.shape)
                self.inputs.write(self.index, hidden)
            self.recorded.append(call)
            # Nothing behind the blocks is wanted: the head's logits would be the largest tensor.
            if not self.every or position == len(self.blocks) - 1:
                raise _Captured
            return hidden

        return stub


def _forward(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> Any:
    accepted = inspect.signature(type(model).forward).parameters
    extra = {"use_cache": False} if "use_cache" in accepted else {}
    return model(**batch, **extra)


class _BlockOutput(torch.Tensor):
    """Hidden states that a model may also take for the tuple that some blocks return (Bloom's), of
    which it wants the first element. What is computed from them is a plain tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __getitem__(self, index: Any) -> torch.Tensor:
        plain = self.as_subclass(torch.Tensor)
        return plain if isinstance(index, int) and index == 0 else plain[index]


def tail_logits(
    model: PreTrainedModel,
    anatomy: Anatomy,
    batch: dict[str, torch.Tensor],
    hidden: torch.Tensor,
) -> torch.Tensor:
    """Logits of a batch from the hidden states that left the last block.

    Runs the model's own forward with the blocks replaced by stubs, so that final norms, heads,
    scalings and soft caps are the model's. Gradients flow to ``hidden`` where they are enabled.
    """
    blocks = [model.get_submodule(b.path) for b in anatomy.blocks]
    output = hidden.as_subclass(_BlockOutput)
    for block in blocks:
        block.forward = lambda *_a, **_k: output
    try:
        return _forward(model, batch).logits
    finally:
        for block in blocks:
            del block.forward


def head_input(
    model: PreTrainedModel,
    anatomy: Anatomy,
    batch: dict[str, torch.Tensor],
    hidden: torch.Tensor,
) -> torch.Tensor | None:
    """What enters the head that predicts tokens, from the hidden states that left the last block:
    behind the final norm and all that a model has there. None where there is no such head."""
    head = model.get_output_embeddings()
    if head is None:
        return None
    found: list[torch.Tensor] = []

    def reached(_module: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0])
        raise _Captured  # the logits would be the largest tensor

    hook = head.register_forward_pre_hook(reached)
    try:
        with torch.no_grad(), contextlib.suppress(_Captured):
            tail_logits(model, anatomy, batch, hidden)
    finally:
        hook.remove()
    return found[0] if found else None


def trunk_hidden(
    model: PreTrainedModel,
    anatomy: Anatomy,
    batch: dict[str, torch.Tensor],
    layers: Collection[int] = (),
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """Hidden states that leave the last block, and those that leave the blocks ``layers``.

    The counterpart of :func:`tail_logits`; gradients flow where they are enabled.
    """
    last = len(anatomy.blocks) - 1
    found: dict[int, torch.Tensor] = {}

    def hook(index: int):
        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            found[index] = output[0] if isinstance(output, tuple) else output
            if index == last:
                raise _Captured

        return keep

    hooks = [
        model.get_submodule(anatomy.blocks[i].path).register_forward_hook(hook(i))
        for i in sorted({*layers, last})
    ]
    try:
        with contextlib.suppress(_Captured):
            _forward(model, batch)
    finally:
        for handle in hooks:
            handle.remove()
    return found[last], {i: found[i] for i in layers}
