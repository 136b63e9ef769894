"""What enters the first block, and how a model calls all of its blocks: learned from stubs in their
places, batch by batch where the arguments depend on it."""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import (
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
from transformers import PreTrainedModel

from compress.errors import CompressError
from compress.models.anatomy import Anatomy
from compress.models.halves import Captured, run_forward
from compress.models.replay import BlockCall
from compress.system.activations import Activations


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
        with torch.no_grad(), recording, contextlib.suppress(Captured):
            run_forward(model, batch)
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
                raise Captured
            return hidden

        return stub
