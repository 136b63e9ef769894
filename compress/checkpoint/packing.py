"""A quantised linear as stored tensors and back: compressed-tensors' integer formats.

``pack-quantized`` (weights only) packs codes densely into int32 words; ``int-quantized`` (8-bit
weights with 8-bit activations) stores them as int8. Both are read by compressed-tensors and vLLM.
"""

from __future__ import annotations

import torch

from compress.errors import CompressError
from compress.linear.grid import QuantScheme
from compress.linear.quantized import QuantizedLinear

PACKED, INT8 = "pack-quantized", "int-quantized"

# Packing needs some 20 bytes of scratch a weight; rows are packed in pieces of about this many.
_PIECE = 2**21


def storage_format(scheme: QuantScheme) -> str:
    """Return the compressed-tensors format that a scheme is written in."""
    return INT8 if scheme.activation_bits is not None and scheme.bits == 8 else PACKED


def pack(module: QuantizedLinear, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the stored tensors of a quantised linear, without its bias.

    Args:
        dtype: of the scales in the file.
    """
    codes = module.quantized_values()
    return pack_codes(codes, module.weight_scale, module.weight_zero_point, module.scheme, dtype)


def pack_codes(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    scheme: QuantScheme,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """The same from codes [out, in] int8 and a grid [out, groups]."""
    stored = {"weight_scale": scale.to(dtype).contiguous()}
    if storage_format(scheme) == INT8:
        stored["weight"] = codes
        if zero_point is not None:
            stored["weight_zero_point"] = zero_point.contiguous()
        return stored
    stored["weight_packed"] = _pack_rows(codes, scheme.bits)
    stored["weight_shape"] = torch.tensor(codes.shape)
    if zero_point is not None:
        # Zero points are packed along the rows: [words(out), groups].
        stored["weight_zero_point"] = _pack_rows(zero_point.t(), scheme.bits).t().contiguous()
    return stored


def unpack(
    stored: dict[str, torch.Tensor], scheme: QuantScheme, shape: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return codes [out, in] int8, scale [out, groups] float32 and zero point int8 or None.

    Args:
        stored: tensors as :func:`pack` names them.
        shape: (out, in) of the linear.

    Raises:
        CompressError: a tensor is missing, left over, or of another shape than the scheme's.
    """
    rows, columns = shape
    groups = scheme.groups(columns)
    expected = stored_shapes(scheme, rows, columns)
    check_names(set(stored), set(expected))
    for name, want in expected.items():
        check_shape(name, stored[name], want)
    scale = stored["weight_scale"].float()
    zero_point = stored.get("weight_zero_point")
    if storage_format(scheme) == INT8:
        return stored["weight"], scale, zero_point
    if tuple(stored["weight_shape"].tolist()) != shape:
        raise CompressError(
            f"weight_shape {list(shape)}", f"{stored['weight_shape'].tolist()}",
            "The config and the weights belong to different models",
        )  # fmt: skip
    codes = _unpack_rows(stored["weight_packed"], scheme.bits, columns)
    if zero_point is not None:
        packed = zero_point.t().contiguous()
        zero_point = _unpack_rows(packed, scheme.bits, rows).t().contiguous()
        zero_point = zero_point.view(rows, groups)
    return codes, scale, zero_point


def stored_shapes(scheme: QuantScheme, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the tensors that :func:`pack` makes for [rows, columns]."""
    groups = scheme.groups(columns)
    shapes: dict[str, tuple[int, ...]] = {"weight_scale": (rows, groups)}
    if storage_format(scheme) == INT8:
        shapes["weight"] = (rows, columns)
        if not scheme.symmetric:
            shapes["weight_zero_point"] = (rows, groups)
        return shapes
    shapes["weight_packed"] = (rows, _words(columns, scheme.bits))
    shapes["weight_shape"] = (2,)
    if not scheme.symmetric:
        shapes["weight_zero_point"] = (_words(rows, scheme.bits), groups)
    return shapes


def stored_dtypes(scheme: QuantScheme) -> dict[str, torch.dtype]:
    """Return the types of these tensors; that of scales is the checkpoint's, and float32 here."""
    codes = torch.int8 if storage_format(scheme) == INT8 else torch.int32
    return {
        "weight": codes, "weight_packed": codes, "weight_zero_point": codes,
        "weight_shape": torch.int64, "weight_scale": torch.float32,
    }  # fmt: skip


def check_names(got: set[str], expected: set[str]) -> None:
    """Raise unless the names of a checkpoint's tensors are the ones the config implies."""
    missing, unexpected = sorted(expected - got), sorted(got - expected)
    if missing or unexpected:
        found = [f"none named {', '.join(missing[:3])}"] if missing else []
        found += [f"also {', '.join(unexpected[:3])}"] if unexpected else []
        raise CompressError(
            "the tensors that config.json implies",
            " and ".join(found),
            "The checkpoint is incomplete or belongs to another config",
        )


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless a stored tensor has the shape that the config implies."""
    if tuple(tensor.shape) != tuple(shape):
        raise CompressError(
            f"{name} of shape {list(shape)}",
            f"{list(tensor.shape)}",
            "The config and the weights belong to different models",
        )


def _words(values: int, bits: int) -> int:
    return -(-values * bits // 32)


def _pieces(rows: int, columns: int) -> range:
    return range(0, rows, max(1, _PIECE // max(columns, 1)))


def _pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    pieces = _pieces(*codes.shape)
    return torch.cat([pack_to_int32(codes[i : i + pieces.step], bits) for i in pieces])


def _unpack_rows(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    pieces = _pieces(packed.shape[0], columns)
    parts = (packed[i : i + pieces.step] for i in pieces)
    return torch.cat([unpack_from_int32(p, bits, torch.Size((len(p), columns))) for p in parts])
