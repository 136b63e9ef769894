"""Recomputing layers in the backward pass instead of storing what they computed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from compress.errors import CompressError

_RECOMPUTE = {"use_reentrant": False, "preserve_rng_state": True}


@contextlib.contextmanager
def recomputing(module: nn.Module, wanted: bool) -> Iterator[None]:
    """Let a module of transformers store the inputs of its layers only (gradient checkpointing).

    The layers count as training meanwhile, since they recompute in that mode only; what is inside
    them, dropout say, keeps its mode. Random numbers are the same when recomputed.

    Raises:
        CompressError: the module cannot.
    """
    if not wanted:
        yield
        return
    if not getattr(module, "supports_gradient_checkpointing", False):
        raise CompressError(
            "a module that supports gradient checkpointing",
            type(module).__name__,
            "Set gradient_checkpointing: false and a smaller micro_batch",
        )
    # Both names are in use: transformers has renamed it within version 5.
    renamed = hasattr(module, "activation_checkpointing_enable")
    kind = "activation" if renamed else "gradient"
    getattr(module, f"{kind}_checkpointing_enable")(_RECOMPUTE)
    layers = [m for m in module.modules() if getattr(m, "gradient_checkpointing", False)]
    modes = [m.training for m in layers]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer, mode in zip(layers, modes, strict=True):
            layer.training = mode
        getattr(module, f"{kind}_checkpointing_disable")()
