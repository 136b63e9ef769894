"""Forward passes of a block, and products, in another type than their matrices are kept in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from compress.linear.matrix import is_linear


@contextmanager
def computing(module: nn.Module, dtype: torch.dtype, keep: bool = True) -> Iterator[None]:
    """Matrix products of the module are in ``dtype`` meanwhile, all sums beside them in float32.

    The weights of linears are cast once, not in every forward: half as much memory as the float32
    ones take, as long as the context is open. What flows between them is cast by autocast, which
    leaves norms and softmax in float32; residual additions are of float32 values, so hidden states
    lose nothing from block to block.

    Args:
        module: a block or a model, its floating parameters in float32 and of no interest to
            anybody else meanwhile.
        dtype: float32 changes nothing.
        keep: put the float32 weights back at the end; without, the cast ones stay.
    """
    if dtype == torch.float32:
        yield
        return
    device, full = "cpu", []
    for owner in module.modules():
        if is_linear(owner) and owner.weight.dtype == torch.float32:
            device = owner.weight.device.type
            if keep:
                full.append((owner, owner.weight))
            owner.weight = nn.Parameter(owner.weight.data.to(dtype), requires_grad=False)
    try:
        with torch.autocast(device, dtype):
            yield
    finally:
        for owner, weight in full:
            owner.weight = weight


def is_mixed(device_type: str) -> bool:
    """Whether autocast chooses the types of products on a device."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def unmixed(device_type: str) -> AbstractContextManager[object]:
    """No autocast meanwhile, on devices that have it (``meta`` has none)."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
