"""One block in memory at a time: weights stay in safetensors until they are needed."""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import (
    Collection,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    MutableSequence,
    Sequence,
)
from dataclasses import dataclass
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


@dataclass
class _Shape:
    """Batches of one tensor that have one shape.

    Attributes:
        values: of the first batch; None once ``same`` is known.
        calls: of the first batch, an entry a block.
        same: whether blocks are called alike for all of them; None while no other batch was seen.
    """

    values: torch.Tensor | None
    calls: list[BlockCall]
    same: bool | None = None


def capture_inputs(
    model: PreTrainedModel,
    anatomy: Anatomy,
    batches: Iterable[dict[str, torch.Tensor]],
    inputs: Activations,
    in_order: bool = False,
) -> list[list[BlockCall]]:
    """Embed all batches and learn how the model calls its blocks.

    Writes the hidden states that enter the first block to ``inputs``.

    Args:
        in_order: each batch will pass all blocks once, one after the other, before the next batch
            does. Then blocks may hand things on in an argument.

    Returns:
        calls[block][batch]. Batches of one tensor that have one shape share the calls, or those
        arguments that do not depend on the batch.

    Raises:
        CompressError: blocks hand things on to each other in an argument.
    """
    blocks = [model.get_submodule(b.path) for b in anatomy.blocks]
    calls: list[list[BlockCall]] = [[] for _ in blocks]
    shapes: dict[tuple[int, ...], _Shape] = {}
    for index, batch in enumerate(batches):
        # Masks and conditions reach the blocks as arguments: only what is all shape is shared.
        values = next(iter(batch.values())) if len(batch) == 1 else None
        shape = None if values is None else shapes.get(tuple(values.shape))
        recorded: list[BlockCall] = []
        every = shape is None or not shape.same
        recording = _recording(blocks, recorded, inputs, index, every=every)
        with torch.no_grad(), recording, contextlib.suppress(_Captured):
            _forward(model, batch)
        if shape is None:
            if not in_order:
                _check_handing_on(model, blocks, recorded)
            _note_padding(recorded, batch.get("attention_mask"), recording.shape)
            if values is not None:
                shapes[tuple(values.shape)] = _Shape(values, recorded)
        else:
            recorded = _shared_calls(shape, recorded, values)
        for position, call in enumerate(recorded):
            calls[position].append(call)
    return calls


def _shared_calls(
    shape: _Shape, recorded: list[BlockCall], values: torch.Tensor | None
) -> list[BlockCall]:
    """The calls of another batch of a shape, with all that they have in common with the first."""
    if shape.same:
        return shape.calls
    calls = []
    for first, call in zip(shape.calls, recorded, strict=True):
        args, kwargs = _common(first.args, call.args), _common(first.kwargs, call.kwargs)
        alike = args is first.args and kwargs is first.kwargs
        calls.append(first if alike else BlockCall(args, kwargs, call.hidden_keyword))
    # The same text twice would show nothing. One other is looked at, not all: what a model makes
    # of tokens (Gemma 3n's inputs of each layer, Zamba's embeddings) differs at once.
    if shape.same is None and _common(shape.values, values) is not shape.values:
        shape.same = all(a is b for a, b in zip(shape.calls, calls, strict=True))
        shape.values = None
    return calls


def _common(first: Any, value: Any) -> Any:
    """``first`` where ``value`` is equal to it, so that it is in memory once; of tuples and dicts,
    what is equal in them. Objects of unknown kinds are equal to nothing but themselves."""
    if type(first) is not type(value):
        return value
    if isinstance(value, torch.Tensor):
        alike = first.dtype == value.dtype and first.device == value.device
        return first if alike and torch.equal(first, value) else value
    if isinstance(value, Mapping):
        if first.keys() != value.keys():
            return value
        parts = {k: _common(first[k], v) for k, v in value.items()}
        if all(parts[k] is first[k] for k in parts):
            return first
        return parts if type(value) is dict else value
    if isinstance(value, (tuple, list)):
        if len(first) != len(value):
            return value
        items = [_common(a, b) for a, b in zip(first, value, strict=True)]
        if all(a is b for a, b in zip(first, items, strict=True)):
            return first
        return tuple(items) if type(value) is tuple else value
    if isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return first if first == value else value
    return value


def _check_handing_on(
    model: PreTrainedModel, blocks: Sequence[nn.Module], calls: Sequence[BlockCall]
) -> None:
    """Refuse containers that several blocks get and that nothing is in yet: one block fills them
    for another, and what it fills in belongs to one batch and to weights that change.

    Raises:
        CompressError: naming the argument.
    """
    # Gemma 4 gives its blocks such a container also where none of them shares keys and values.
    if getattr(model.config.get_text_config(), "num_kv_shared_layers", None) == 0:
        return
    given = [
        (name, value)
        for block, call in zip(blocks, calls, strict=False)
        for name, value in _arguments(block, call)
        if _is_unfilled(value)
    ]
    times = Counter(id(value) for _, value in given)
    for name, value in given:
        if times[id(value)] > 1:
            raise CompressError(
                "blocks that hand things on to each other in the residual stream only",
                f"{type(model).__name__}, whose blocks fill and read {name} "
                f"(a {type(value).__name__})",
                "Use a method that needs no calibration text, or another model",
            )


def _arguments(block: nn.Module, call: BlockCall) -> Iterator[tuple[str, Any]]:
    names = list(inspect.signature(type(block).forward).parameters)[2:]
    for position, value in enumerate(call.args):
        yield names[position] if position < len(names) else f"argument {position + 2}", value
    yield from call.kwargs.items()


def _is_unfilled(value: Any) -> bool:
    if isinstance(value, MutableMapping):
        return all(item is None for item in value.values())
    return isinstance(value, MutableSequence) and all(item is None for item in value)


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
