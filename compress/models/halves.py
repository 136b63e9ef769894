"""A model's forward in two halves: its blocks, and what comes behind them."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from compress.models.anatomy import Anatomy


class Captured(Exception):
    """Ends a model's forward where nothing behind is wanted."""


def run_forward(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> Any:
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
        return run_forward(model, batch).logits
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
        raise Captured  # the logits would be the largest tensor

    hook = head.register_forward_pre_hook(reached)
    try:
        with torch.no_grad(), contextlib.suppress(Captured):
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
                raise Captured

        return keep

    hooks = [
        model.get_submodule(anatomy.blocks[i].path).register_forward_hook(hook(i))
        for i in sorted({*layers, last})
    ]
    try:
        with contextlib.suppress(Captured):
            run_forward(model, batch)
    finally:
        for handle in hooks:
            handle.remove()
    return found[last], {i: found[i] for i in layers}
