"""Products with weights of up to 4 bits by PyTorch's own kernels (tinygemm), in bfloat16, for GPUs.

``torch.ops.aten._weight_int4pack_mm`` reads weights in tiles of its own: unsigned codes q, and of
each group and output a scale and an offset, w = (q - 8) scale + offset. Inputs, scales, offsets and
results are bfloat16. The same product exists for CPUs (``…_for_cpu``), where it is fast in bfloat16
only and float32 models are the rule (docs/runtime.md): there it is what tests compare with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

BITS = 4
_GROUPS = (32, 64, 128, 256)  # that the kernels have
_OUT, _IN = 8, 16  # outputs and inputs of a tile
_CAPABILITY = (8, 0)  # of GPUs: the first with bfloat16 products
_HALF = 2 ** (BITS - 1)


@dataclass(frozen=True)
class Tiles:
    """Weights as the kernels read them.

    Attributes:
        weights: codes, in an order of the device's.
        scales: scale and offset of each group and output, bfloat16 [groups, out, 2].
        group: inputs of a group.
    """

    weights: torch.Tensor
    scales: torch.Tensor
    group: int


def fits(out_features: int, in_features: int, bits: int, group: int | None) -> bool:
    """Whether the kernels have products of such weights."""
    even = out_features % _OUT == 0 and in_features % (2 * _IN) == 0
    return bits <= BITS and group in _GROUPS and in_features % (group or 1) == 0 and even


def has_kernels(device: torch.device) -> bool:
    """Whether a device is a GPU that has them."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= _CAPABILITY


def tiles(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None) -> Tiles:
    """Put weights into tiles, on the device where they are.

    Args:
        codes: [out, in] int8, from -8 to 7; what :func:`fits` takes.
        scale: [groups, out].
        zero_point: of the same shape, on the scale of ``codes``; None where it is 0.
    """
    inner = next(n for n in (8, 4, 2) if codes.shape[1] % (n * _IN) == 0)
    unsigned = codes.to(torch.int32) + _HALF
    if codes.is_cuda:
        pairs = (unsigned[:, ::2] << BITS | unsigned[:, 1::2]).to(torch.uint8)
        weights = torch.ops.aten._convert_weight_to_int4pack(pairs, inner)
    else:
        weights = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, inner)
    offset = torch.zeros_like(scale) if zero_point is None else -scale * zero_point
    scales = torch.stack((scale, offset), -1).to(torch.bfloat16).contiguous()
    return Tiles(weights, scales, codes.shape[1] // len(scale))


def product(rows: torch.Tensor, held: Tiles) -> torch.Tensor:
    """Inputs [rows, in] bfloat16 times the weights: [rows, out] bfloat16."""
    name = "_weight_int4pack_mm" if rows.is_cuda else "_weight_int4pack_mm_for_cpu"
    multiply = getattr(torch.ops.aten, name)
    return multiply(rows.contiguous(), held.weights, held.group, held.scales)
