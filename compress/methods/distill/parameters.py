"""Which parameters of a compressed model learn, and how what a step has zeroed stays zero."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from compress.linear.layer import is_layer, parts_of, tables_of
from compress.linear.matrix import is_linear
from compress.linear.quantized import scheme_of
from compress.methods.distill.lora import Adapter, adapters, is_adapters


def plain_linears(block: nn.Module, names: Iterable[str], tables: bool = False) -> list[str]:
    """Paths of the matrices in floating point at or inside some linears and layers of a block.

    Args:
        tables: those too that hold the numbers of a layer without parts.
    """
    paths = []
    for name in names:
        module = block.get_submodule(name)
        paths += parts_of(module, name) or (tables_of(module, name) if tables else [])
    return [path for path in paths if scheme_of(block.get_submodule(path)) is None]


def learning(
    block: nn.Module, names: Iterable[str], weights: bool, norms: bool
) -> dict[str, nn.Parameter]:
    """The parameters of a block that learn, by name.

    Args:
        names: linears and layers that are meant. None: nothing in the block learns.
        weights: their matrices, where they are in floating point; adapters learn in any case.
        norms: norms, and biases but those of linears that are not meant.
    """
    names = tuple(names)
    if not names:
        return {}
    found: dict[str, nn.Parameter] = {}
    placed = adapters(block)
    for path, adapter in placed.items():
        found |= {f"{path}.{name}": p for name, p in adapter.learned().items()}
    if weights:
        for path in plain_linears(block, names, tables=True):
            found[f"{path}.weight"] = block.get_submodule(path).weight
    if norms:
        found |= {n: p for n, p in _vectors(block, set(names)) if n not in found}
    return found


def _vectors(block: nn.Module, names: set[str]) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of one dimension that are in no linear or layer but those that are meant."""

    def visit(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Parameter]]:
        if isinstance(module, Adapter):
            if module.inner.bias is not None:
                yield f"{path}.layer.base_layer.bias", module.inner.bias
            return
        if (is_linear(module) or is_layer(module)) and not any(
            path == name or path.startswith(f"{name}.") for name in names
        ):
            return
        for name, parameter in module.named_parameters(path, recurse=False):
            if parameter.dim() == 1 and parameter.is_floating_point():
                yield name, parameter
        for name, child in module.named_children():
            yield from visit(child, f"{path}.{name}" if path else name)

    yield from visit(block, "")


@contextmanager
def opened(parameters: dict[str, nn.Parameter]) -> Iterator[None]:
    """Let parameters learn; entries of matrices that are zero get no gradient meanwhile, so they
    stay zero whatever the optimiser does with the others. Adapters, one of whose matrices is zero
    to begin with, mask what they add themselves."""
    handles = []
    for name, parameter in parameters.items():
        parameter.requires_grad_(True)
        if parameter.dim() < 2 or is_adapters(name):
            continue
        zeros = parameter.detach() == 0
        if bool(zeros.any()):
            handles.append(parameter.register_hook(_masking(zeros)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _masking(zeros: torch.Tensor):
    return lambda gradient: gradient.masked_fill(zeros, 0)
