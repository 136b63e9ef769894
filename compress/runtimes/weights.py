"""What the exporters take of a linear: its numbers, on a grid or not, part by part."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from compress.checkpoint.embeddings import read_embeddings
from compress.checkpoint.packing import stored_shapes, unpack
from compress.checkpoint.state import ModelState
from compress.linear.absent import AbsentLinear
from compress.linear.grid import QuantScheme
from compress.linear.layer import Layer
from compress.linear.matrix import matrix
from compress.linear.quantized import QuantizedLinear


@dataclass(frozen=True)
class Grid:
    """The integers of a quantised matrix: a weight is ``(code - zero_point) * scale``.

    Attributes:
        codes: [out, in], int8.
        scale: [out, groups], float32.
        zero_point: [out, groups], int8; None where symmetric.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    scheme: QuantScheme

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.codes.shape[1] // self.scale.shape[1]


@dataclass(frozen=True)
class Matrix:
    """One plain linear: its map as a matrix or as a grid, and its bias.

    Attributes:
        name: as the checkpoint calls the module.
        dense: [out, in], float32; None where there is a grid.
        bias: [out], float32, or None.
    """

    name: str
    shape: tuple[int, int]
    dense: torch.Tensor | None
    grid: Grid | None
    bias: torch.Tensor | None


def matrices(module: nn.Module, name: str) -> tuple[Matrix, ...]:
    """The plain linears that an input of ``module`` passes one after the other.

    None for a map that was removed. A layer that cannot be taken apart is the matrix that it
    stands for.
    """
    if isinstance(module, AbsentLinear):
        return ()
    if isinstance(module, Layer):
        if parts := module.parts():
            return tuple(_matrix(module.get_submodule(p), f"{name}.{p}") for p in parts)
        dense = module.dense().detach().float()
        return (Matrix(name, tuple(dense.shape), dense, None, _values(module.bias)),)
    return (_matrix(module, name),)


def table(state: ModelState, path: str) -> Matrix:
    """The embedding or the head at ``path`` of a checkpoint, on the grid of a step or not."""
    scheme = read_embeddings(state.config).get(path)
    if scheme is None:
        values = state.source.get(f"{path}.weight").float()
        return Matrix(path, tuple(values.shape), values, None, None)
    rows, columns = state.source.get(f"{path}.weight_shape").tolist()
    names = stored_shapes(scheme, rows, columns)
    stored = {name: state.source.get(f"{path}.{name}") for name in names}
    codes, scale, zero_point = unpack(stored, scheme, (rows, columns))
    return Matrix(path, (rows, columns), None, Grid(codes, scale, zero_point, scheme), None)


def _matrix(module: nn.Module, name: str) -> Matrix:
    shape = tuple(matrix(module).shape)
    bias = _values(module.bias)
    if isinstance(module, QuantizedLinear):
        grid = Grid(
            module.quantized_values(), module.weight_scale, module.weight_zero_point, module.scheme
        )
        return Matrix(name, shape, None, grid, bias)
    return Matrix(name, shape, matrix(module).detach().float(), None, bias)


def _values(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach().float()


def is_removed(module: nn.Module) -> bool:
    """Whether a map was removed: it returns zeros, whatever comes."""
    return isinstance(module, AbsentLinear)
