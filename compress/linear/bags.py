"""Codes of 2, 4 or 8 bits in memory, and sums of their rows: what a product with packed weights is.

An embedding bag adds up rows of a table, each times a number. With a row for every *input* of a
linear map, times that input, it is the map's product. PyTorch has such bags for packed tables
(``quantized::embedding_bag_4bit_rowwise_offsets``; FBGEMM generates the code for the processor it
runs on, AVX2 or AVX-512, and there is a plain loop elsewhere). They multiply and add in float32,
whereas ``_weight_int4pack_mm_for_cpu`` and ``_weight_int8pack_mm`` are fast only where activations,
scales and results are rounded to bfloat16.

A table is uint8 [inputs, bytes]: of each row first the codes of all outputs, lowest bits first,
then a scale and an offset of its own (float16, with bytes float32), which are 1 and minus half of
the range here: scales belong to outputs and groups of inputs, and so to what a bag returns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import _disable_current_modes

WIDTHS = (2, 4, 8)  # bits of a code in a table
_TAIL = {2: torch.float16, 4: torch.float16, 8: torch.float32}  # of scale and offset
_NAMES = {
    2: "embedding_bag_2bit_rowwise_offsets",
    4: "embedding_bag_4bit_rowwise_offsets",
    8: "embedding_bag_byte_rowwise_offsets",
}
# Rows are packed in pieces of about this many codes, so that scratch memory stays small.
_PIECE = 2**22


def width_for(bits: int) -> int:
    """The narrowest code of a table that holds ``bits``."""
    return next(width for width in WIDTHS if width >= bits)


def make_table(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The table of a matrix of codes.

    Args:
        codes: [out, in] int8, from -2^(bits - 1) to 2^(bits - 1) - 1.

    Returns:
        uint8 [in, bytes], contiguous.
    """
    width = width_for(bits)
    rows, columns = codes.shape
    packed = -(-rows * width // 8)
    tail = torch.tensor([1.0, -(2.0 ** (width - 1))], dtype=_TAIL[width]).view(torch.uint8)
    table = codes.new_empty(columns, packed + len(tail), dtype=torch.uint8)
    table[:, packed:] = tail.to(codes.device)
    step = max(1, _PIECE // max(rows, 1))
    for start in range(0, columns, step):
        part = codes[:, start : start + step].t().to(torch.int16) + 2 ** (width - 1)
        part = torch.nn.functional.pad(part, (0, packed * (8 // width) - rows)).to(torch.uint8)
        part = part.unflatten(1, (packed, 8 // width))
        target = table[start : start + step, :packed]
        target.copy_(part[..., 0])
        for place in range(1, 8 // width):
            target |= part[..., place] << place * width
    return table


def outputs_of(table: torch.Tensor, width: int) -> int:
    """How many codes a row of a table holds, those that fill its last byte included."""
    return (table.shape[1] - 2 * _TAIL[width].itemsize) * (8 // width)


def bag_sums(table: torch.Tensor, width: int, inputs: torch.Tensor, length: int) -> torch.Tensor:
    """Sums of codes times inputs over every ``length`` inputs: [tokens, bags, outputs], float32.

    Args:
        table: on the CPU, of codes of ``width`` bits.
        inputs: [tokens, in] float32.
    """
    tokens, columns = inputs.shape
    indices, offsets = _places(tokens, columns, length)
    sums = _bag(width)(
        table, indices, offsets=offsets, per_sample_weights=inputs.reshape(-1).contiguous()
    )
    return sums.view(tokens, -1, sums.shape[-1])


def codes_of(table: torch.Tensor, width: int, start: int, stop: int) -> torch.Tensor:
    """The codes of inputs ``start`` to ``stop`` as float32 [stop - start, outputs]."""
    part = table[start:stop]
    if kernels(table.device):
        indices, offsets = _places(1, stop - start, 1)
        return _bag(width)(part, indices, offsets=offsets)
    return plain_codes(part, width)


def plain_codes(table: torch.Tensor, width: int) -> torch.Tensor:
    """The same in operations that every device has."""
    packed = table[:, : -2 * _TAIL[width].itemsize]
    if width < 8:
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=table.device)
        packed = (packed.unsqueeze(-1) >> shifts) & (2**width - 1)
        packed = packed.flatten(1)
    return packed.float().sub_(2.0 ** (width - 1))


@functools.cache
def kernels(device: torch.device) -> bool:
    """Whether PyTorch's bags work on a device: there are some, and their sums are right."""
    # It may be asked under torch.device("meta"), or where operations are counted.
    with _disable_current_modes(), torch.device("cpu"):
        return device.type == "cpu" and all(_right(width) for width in WIDTHS)


def _right(width: int) -> bool:
    half = 2 ** (width - 1)
    codes = (torch.arange(40 * 32, dtype=torch.int16) % (2 * half) - half).to(torch.int8)
    codes = codes.view(40, 32)
    inputs = torch.linspace(-1, 1, 64).view(2, 32)
    try:
        found = bag_sums(make_table(codes, width), width, inputs, 16)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    bags = inputs.view(2, 1, 2, 16) * codes.float().view(1, 40, 2, 16)
    return torch.allclose(found, bags.sum(-1).transpose(1, 2), rtol=1e-5, atol=1e-3)


def _bag(width: int) -> Callable[..., torch.Tensor]:
    return getattr(torch.ops.quantized, _NAMES[width])


@functools.lru_cache(maxsize=256)
def _places(tokens: int, columns: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of all rows once a token, and where each bag begins in them."""
    cpu = {"dtype": torch.int32, "device": "cpu"}
    indices = torch.arange(columns, **cpu).repeat(tokens)
    starts = torch.arange(0, columns, length, **cpu)
    firsts = torch.arange(tokens, **cpu)[:, None] * columns
    return indices, (firsts + starts).flatten()
