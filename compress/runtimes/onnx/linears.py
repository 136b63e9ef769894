"""Linears as onnxruntime multiplies them: floats, integer blocks, integers on both sides.

Weights on a grid keep their codes, scales and zero points to the bit. MatMulNBits of 2, 4 and 8
bits holds grids of 2 to 8 bits (a code of three bits is one of four), in blocks of a power of two
from 16 on; a group may span several. Grids whose inputs are rounded too (W8A8) are multiplied as
integers, the inputs rounded at run time as :func:`compress.linear.grid.fake_quantize_tokens` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from compress.errors import CompressError
from compress.runtimes.onnx.graph import MICROSOFT, Graph
from compress.runtimes.weights import Grid, Matrix

WIDTHS = (2, 4, 8)
_SMALLEST, _LARGEST = 16, 128
_HALF = 128  # unsigned codes of a signed byte are this much larger


def block_size(group: int, columns: int, name: str) -> int:
    """The largest block of MatMulNBits that no group's border cuts.

    Raises:
        CompressError: groups that are no multiple of 16, several to a row.
    """
    size = _LARGEST
    while size >= _SMALLEST:
        if group % size == 0:
            return size
        size //= 2
    if group == columns:  # one scale a row: the last block may be longer than the row
        return _SMALLEST
    raise CompressError(
        f"groups of a multiple of {_SMALLEST} weights, as onnxruntime's blocks are",
        f"groups of {group} at {name}", "Quantise with group_size 16, 32, 64 or 128",
    )  # fmt: skip


def linear(graph: Graph, x: str, parts: Sequence[Matrix], accuracy: int) -> str:
    """The product of an input [..., in] with the matrices one after the other: [..., out].

    Args:
        accuracy: of MatMulNBits: 1 multiplies floats, 4 rounds the inputs of each block to int8.
    """
    assert parts, "a removed map is left out with its sub-layer"
    for matrix in parts:
        x = _linear(graph, x, matrix, accuracy)
    return x


def merged(branches: Sequence[Sequence[Matrix]]) -> tuple[Matrix, ...] | None:
    """Linears of one input as one linear with their outputs in a row; None where they differ in
    kind. One large product is faster than several small ones."""
    if any(len(parts) != 1 for parts in branches):
        return None
    matrices = [parts[0] for parts in branches]
    first = matrices[0]
    grids = [m.grid for m in matrices]
    biases = [m.bias for m in matrices]
    if len({(g.scheme, g.scale.shape[1]) if g else None for g in grids}) != 1:
        return None
    bias = None
    if any(b is not None for b in biases):
        bias = torch.cat([torch.zeros(m.shape[0]) if m.bias is None else m.bias for m in matrices])
    rows = sum(m.shape[0] for m in matrices)
    grid = None if first.grid is None else _stacked([g for g in grids if g is not None])
    dense = None
    if grid is None:
        dense = torch.cat([m.dense for m in matrices if m.dense is not None])
    return (replace(first, name=f"{first.name}+{len(matrices) - 1}", shape=(rows, first.shape[1]),
                    dense=dense, grid=grid, bias=bias),)  # fmt: skip


def _stacked(grids: Sequence[Grid]) -> Grid:
    zeros = [g.zero_point for g in grids if g.zero_point is not None]
    return Grid(
        torch.cat([g.codes for g in grids]),
        torch.cat([g.scale for g in grids]),
        torch.cat(zeros) if zeros else None,
        grids[0].scheme,
    )


def _linear(graph: Graph, x: str, matrix: Matrix, accuracy: int) -> str:
    if matrix.grid is None:
        assert matrix.dense is not None
        weight = graph.constant(matrix.dense.t().contiguous().numpy(), f"{matrix.name}.weight")
        y = graph.node("MatMul", x, weight)
    elif matrix.grid.scheme.activation_bits is not None:
        y = _integers(graph, x, matrix.name, matrix.grid)
    else:
        y = blocks_product(graph, x, matrix.name, pack_blocks(matrix.grid, matrix.name), accuracy)
    if matrix.bias is not None:
        y = graph.node("Add", y, graph.constant(matrix.bias.numpy(), f"{matrix.name}.bias"))
    return y


class Blocks:
    """The tensors of a MatMulNBits: packed codes, scales and, where asymmetric, zero points."""

    def __init__(
        self, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, bits: int,
        size: int, columns: int,
    ) -> None:  # fmt: skip
        self.codes, self.scales, self.zeros = codes, scales, zeros
        self.bits, self.size, self.columns = bits, size, columns

    @property
    def rows(self) -> int:
        return self.codes.shape[0]


def pack_blocks(grid: Grid, name: str) -> Blocks:
    """A grid in onnxruntime's form: codes [out, blocks, bytes], scales [out, blocks]."""
    rows, columns = grid.codes.shape
    size = block_size(grid.group, columns, name)
    bits = next(width for width in WIDTHS if width >= grid.scheme.bits)
    half = 2 ** (bits - 1)
    count = -(-columns // size)
    unsigned = np.full((rows, count * size), half, np.uint8)
    unsigned[:, :columns] = (grid.codes.numpy().astype(np.int16) + half).astype(np.uint8)
    repeats = count if grid.scale.shape[1] == 1 else grid.group // size
    scales = grid.scale.numpy().repeat(repeats, axis=1)
    zeros = None
    if grid.zero_point is not None:
        shifted = (grid.zero_point.numpy().astype(np.int16) + half).astype(np.uint8)
        zeros = packed(shifted.repeat(repeats, axis=1), bits)
    codes = packed(unsigned.reshape(rows, count, size), bits)
    return Blocks(codes, scales, zeros, bits, size, columns)


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned codes densely in bytes along the last dimension, the first one lowest."""
    each = 8 // bits
    short = -codes.shape[-1] % each
    if short:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], short), np.uint8)], axis=-1)
    parts = codes.reshape(*codes.shape[:-1], -1, each)
    return np.bitwise_or.reduce(parts << (np.arange(each, dtype=np.uint8) * bits), axis=-1)


def blocks_product(graph: Graph, x: str, name: str, blocks: Blocks, accuracy: int) -> str:
    """A MatMulNBits of an input [..., in] with packed blocks."""
    inputs = [
        x,
        graph.constant(blocks.codes, f"{name}.codes"),
        graph.floats(blocks.scales.reshape(-1), f"{name}.scales"),
    ]
    if blocks.zeros is not None:
        inputs.append(graph.constant(blocks.zeros.reshape(-1), f"{name}.zeros"))
    return graph.node(
        "MatMulNBits", *inputs, domain=MICROSOFT, N=blocks.rows, K=blocks.columns,
        bits=blocks.bits, block_size=blocks.size, accuracy_level=accuracy,
    )  # fmt: skip


def _integers(graph: Graph, x: str, name: str, grid: Grid) -> str:
    """int8 weights times inputs rounded to int8, one scale a token: x / s, rounded, times s.

    Both sides are shifted to unsigned bytes. Processors without VNNI multiply an unsigned by a
    signed byte with saturation, which ruins a model; unsigned by unsigned is exact everywhere.
    """
    flat = graph.node("Reshape", x, graph.constant(np.array([-1, grid.codes.shape[1]])))
    largest = graph.node("ReduceMax", graph.node("Abs", flat), graph.constant(np.array([1])))
    scale = graph.node("Div", largest, graph.constant(np.float32(127.5)))
    tiny = graph.constant(np.float32(np.finfo(np.float32).tiny))
    scale = graph.node("Max", scale, tiny)
    ratio = graph.node("Div", flat, scale)
    one, half = graph.constant(np.float32(1)), graph.constant(np.uint8(_HALF))
    rounded = graph.node("QuantizeLinear", ratio, one, half)
    codes = (grid.codes.t().numpy().astype(np.int16) + _HALF).astype(np.uint8)
    weight = graph.constant(codes, f"{name}.codes")
    scales = graph.constant(grid.scale.reshape(-1).numpy(), f"{name}.scales")
    y = graph.node(
        "MatMulIntegerToFloat", rounded, weight, one, scales, half, half, domain=MICROSOFT
    )
    y = graph.node("Mul", y, scale)
    lead = graph.node("Shape", x, end=-1)
    shape = graph.node("Concat", lead, graph.constant(np.array([grid.codes.shape[0]])), axis=0)
    return graph.node("Reshape", y, shape)
