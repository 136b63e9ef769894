"""The block types of GGUF as homes of our grids: which of them holds a grid, and how it is packed.

A block is 32 weights of a row with a float16 scale d and, in the types that end in _1, a float16
minimum m. Its values are ``(q - offset) * d`` or ``q * d + m`` (ggml-common.h, ggml-quants.c of
github.com/ggml-org/llama.cpp). Ours are ``(code - zero_point) * scale``: the same with other names,
so codes are carried over as they are. Scales that are no float16 numbers are rounded to them, as
are minima; ``scales: float16`` of a quantising step makes grids of which nothing is rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from compress.errors import CompressError
from compress.linear.grid import QuantScheme
from compress.runtimes.weights import Grid

BLOCK = 32
FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class BlockType:
    """A quantised type of GGUF.

    Attributes:
        bits: of a code.
        offset: what is taken from the unsigned code (types without a minimum).
        minimum: whether a block has one.
    """

    name: str
    bits: int
    offset: int
    minimum: bool

    @property
    def bytes(self) -> int:
        """Of a block."""
        return 2 + 2 * self.minimum + BLOCK * self.bits // 8

    def holds(self, scheme: QuantScheme) -> bool:
        """Whether every code of a scheme has a code here that stands for the same number."""
        if self.minimum:
            return not scheme.symmetric and scheme.bits <= self.bits
        low, high = scheme.code_range
        if not scheme.symmetric:  # a zero point is any code
            low, high = low - high, high - low
        return -self.offset <= low and high < 2**self.bits - self.offset


# From the smallest: a grid goes to the first that holds it.
TYPES = {
    t.name: t
    for t in (
        BlockType("Q4_0", 4, 8, False),
        BlockType("Q4_1", 4, 0, True),
        BlockType("Q5_0", 5, 16, False),
        BlockType("Q5_1", 5, 0, True),
        BlockType("Q8_0", 8, 128, False),
    )
}
ALL_TYPES = ("auto", *FLOATS, *TYPES)


def type_for(scheme: QuantScheme, columns: int, asked: str, name: str) -> str:
    """The type that holds the grid of a matrix with so many columns.

    Args:
        asked: a type, or "auto" for the smallest that fits.

    Raises:
        CompressError: none fits, or the one asked for does not; names the nearest that does.
    """
    group = scheme.group_size or columns
    kind = f"{scheme.bits} bits, {'symmetric' if scheme.symmetric else 'asymmetric'}"
    if group % BLOCK or columns % BLOCK:
        raise CompressError(
            f"groups and rows of a multiple of {BLOCK} weights, as the blocks of GGUF are",
            f"{name} of {columns} columns in groups of {group}",
            f"Quantise with group_size {BLOCK} (or 64, 128), widths rounded to multiples of it",
        )
    fitting = [t.name for t in TYPES.values() if t.holds(scheme)]
    if not fitting:
        raise CompressError(
            "a grid that a type of GGUF holds", f"{kind} at {name}",
            "Q8_0 is the nearest: it holds 8 bits symmetric, and asymmetric grids of 7 bits and "
            "less",
        )  # fmt: skip
    if asked == "auto":
        return fitting[0]
    if asked not in fitting and asked != "F32":
        raise CompressError(
            f"a grid that {asked} holds", f"{kind} at {name}",
            f"Use --type {fitting[0]}, the nearest that holds it, or --type auto",
        )  # fmt: skip
    return asked


def pack_grid(grid: Grid, name: str) -> tuple[np.ndarray, float]:
    """Codes and scales of a matrix as blocks of a type.

    Returns:
        Bytes [out, blocks x bytes of a block] and the largest relative change of a scale or
        minimum by its rounding to float16.

    Raises:
        CompressError: scales that float16 does not reach.
    """
    kind = TYPES[name]
    rows, columns = grid.codes.shape
    per_group = grid.group // BLOCK
    codes = grid.codes.numpy().astype(np.int16).reshape(rows, -1, BLOCK)
    scale = grid.scale.numpy().repeat(per_group, axis=1)
    zero = np.zeros(scale.shape, np.int16)
    if grid.zero_point is not None:
        zero = grid.zero_point.numpy().astype(np.int16).repeat(per_group, axis=1)
    halves, change = [scale.astype(np.float16)], _change(scale)
    if kind.minimum:
        lowest = grid.scheme.code_range[0]
        minimum = scale * (lowest - zero)
        halves.append(minimum.astype(np.float16))
        change = max(change, _change(minimum))
        unsigned = codes - lowest
    else:
        unsigned = codes - zero[..., None] + kind.offset
    if not all(np.isfinite(half).all() for half in halves) or change > 2**-5:
        raise CompressError(
            "scales within the reach of float16, in which GGUF keeps them",
            f"some that it changes by {change:.1%}", "Quantise weights of an ordinary size",
        )  # fmt: skip
    parts = [half[..., None].view(np.uint8) for half in halves]
    # Q8_0 alone stores signed codes.
    flat = (unsigned - kind.offset).astype(np.int8) if kind.bits == 8 else unsigned.astype(np.uint8)
    parts.append(_packed(flat, kind.bits))
    return np.concatenate(parts, axis=-1).reshape(rows, -1), change


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [rows, blocks, 32] as the bytes of a block behind its scales."""
    if bits == 8:
        return codes.view(np.uint8)
    low = codes & 15
    nibbles = low[..., :16] | (low[..., 16:] << 4)
    if bits == 4:
        return nibbles
    fifth = np.packbits(codes >> 4, axis=-1, bitorder="little")
    return np.concatenate([fifth, nibbles], axis=-1)


def _change(values: np.ndarray) -> float:
    """Largest relative change of numbers by rounding them to float16."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        rounded = values.astype(np.float16).astype(np.float32)
        changes = np.abs(rounded - values) / np.abs(values)
    return float(np.nanmax(changes, initial=0.0))


def round_floats(values: torch.Tensor, name: str) -> np.ndarray:
    """A float matrix as llama.cpp rounds it to a type, each block by itself (``gguf.quants``)."""
    import gguf

    kind = gguf.GGMLQuantizationType[name]
    return gguf.quants.quantize(values.contiguous().numpy(), kind)
