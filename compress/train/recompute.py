"""Recomputing layers in the backward pass instead of storing what they computed."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from compress.errors import CompressError

# A layer that is run twice would write into a cache twice. The names are those that transformers
# takes from its layers while they recompute, and RWKV's; caches of its own class are known by that.
_WITHOUT_CACHE = {"use_cache": False, "past_key_values": None, "layer_past": None, "state": None}


@contextlib.contextmanager
def recomputing(module: nn.Module, wanted: bool) -> Iterator[None]:
    """Let a module of transformers store the inputs of its layers only (gradient checkpointing).

    Meanwhile the layers' ``forward`` is another one, which runs them again in the backward pass of
    what they computed with gradients, on the same random numbers and without a cache. Everything
    keeps its training or evaluation mode: transformers' own switch recomputes in training mode
    only, in which many layers drop out, and leaves hooks on the embeddings.

    Raises:
        CompressError: the module cannot.
    """
    if not wanted:
        yield
        return
    supported = getattr(module, "supports_gradient_checkpointing", False)
    layers = _layers(module) if supported else []
    if not layers:
        raise CompressError(
            "a module that supports gradient checkpointing",
            type(module).__name__,
            "Set gradient_checkpointing: false and a smaller micro_batch",
        )
    own = [vars(layer).get("forward") for layer in layers]  # accelerate sets some, for example
    try:
        for layer in layers:
            layer.forward = _recomputed(layer)
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            if forward is not None:
                layer.forward = forward
            else:
                vars(layer).pop("forward", None)


def _layers(module: nn.Module) -> list[nn.Module]:
    """The layers that store their inputs only; where code of a model's own has none of
    transformers' class, those that are never split between devices."""
    found = [m for m in module.modules() if isinstance(m, GradientCheckpointingLayer)]
    names = getattr(module, "_no_split_modules", None) or ()
    return found or [m for m in module.modules() if type(m).__name__ in names]


def _recomputed(layer: nn.Module) -> Callable[..., Any]:
    """The forward of a layer, run again in the backward pass."""
    forward = layer.forward
    names = list(inspect.signature(forward).parameters)
    # A layer that only reads a cache finds the same in it the second time.
    only_reads = getattr(layer, "_can_checkpoint_with_cache", False)

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        named = zip_longest(names[: len(args)], args, fillvalue="")  # *args have no names
        values = [_without_cache(name, value, only_reads) for name, value in named]
        values += [_without_cache(name, value, only_reads) for name, value in kwargs.items()]

        def replay(*values: Any) -> Any:
            keywords = dict(zip(kwargs, values[len(args) :], strict=True))
            return forward(*values[: len(args)], **keywords)

        # All in a row: of keywords, checkpoint knows neither tensors nor their devices' generators.
        return checkpoint(replay, *values, use_reentrant=False)

    return run


def _without_cache(name: str, value: Any, only_reads: bool) -> Any:
    """An argument of a layer, as it is safe to give twice."""
    if only_reads and name != "use_cache":
        return value
    return None if isinstance(value, Cache) else _WITHOUT_CACHE.get(name, value)
