"""The integer grid: scales, zero points and rounding, as pure functions on matrices.

The grid is the one of compressed-tensors, so that what a solver rounds is what the file holds and
what every reader of the file computes. Codes are signed, ``-2^(bits-1) .. 2^(bits-1) - 1``, in both
the symmetric and the asymmetric case; a weight is ``(code - zero_point) * scale``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from compress.errors import CompressError

# Rows are rounded in pieces of about this many weights, so that scratch memory stays small.
_PIECE = 2**22
# Smaller groups cost more in scales than their fit gains; of those that fit, the largest are named.
_SMALLEST_GROUP, _NAMED = 8, 4


class QuantScheme(BaseModel):
    """What the numbers of one linear are rounded to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: int = Field(ge=2, le=8, description="bits per weight")
    group_size: int | None = Field(
        default=None, ge=1, description="input columns that share a scale; None: a whole row"
    )
    symmetric: bool = Field(default=True, description="no zero point; the grid is centred on 0")
    actorder: bool = Field(
        default=False,
        description="the solver took columns in the order of their activations (groups stay as "
        "they are in the file, so that readers need not know)",
    )
    activation_bits: Literal[8] | None = Field(
        default=None, description="8: inputs are rounded to int8, symmetric, one scale a token"
    )

    @model_validator(mode="after")
    def _activations_need_symmetric_weights(self) -> QuantScheme:
        if self.activation_bits is not None and not self.symmetric:
            raise ValueError("activation_bits needs symmetric weights: integer kernels assume them")
        return self

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code."""
        half = 2 ** (self.bits - 1)
        return -half, half - 1

    def groups(self, columns: int) -> int:
        """Return how many scales a row of ``columns`` weights has.

        Raises:
            CompressError: the group size does not divide the number of columns.
        """
        if self.group_size is None:
            return 1
        if columns % self.group_size:
            raise CompressError(
                f"a number of input columns that the group size {self.group_size} divides",
                str(columns),
                group_size_fix([columns], self.group_size),
            )
        return columns // self.group_size


def group_size_fix(widths: Iterable[int], group_size: int) -> str:
    """What to do about a group size that does not divide all widths, as a sentence.

    Args:
        widths: of everything that is rounded with that group size: a suggestion must suit it all.
    """
    common = math.gcd(*widths)
    largest = min(group_size, common)
    fitting = [g for g in range(largest, _SMALLEST_GROUP - 1, -1) if common % g == 0][:_NAMED]
    if not fitting:
        return "Set group_size: null (one scale a channel)"
    return f"Choose group_size from {fitting} or null (one scale a channel)"


def find_qparams(
    weight: torch.Tensor,
    scheme: QuantScheme,
    scale_dtype: torch.dtype = torch.float32,
    scale_bits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit the grid to the range of each row (min-max; 0 always lies on the grid).

    Args:
        weight: [rows, columns]; each row gets one scale, so pass one group of columns at a time or
            a matrix reshaped to [rows x groups, group size].
        scale_dtype: the dtype that the checkpoint will store scales in. The scale is rounded to it
            here, before anything is rounded with it, so that writing it loses nothing.
        scale_bits: significant bits of a scale, for readers that keep fewer than ``scale_dtype``
            has (:func:`half_scale_bits`); None for all.

    Returns:
        scale [rows, 1] in float32 and zero point [rows, 1] in int8 (zeros where symmetric).
    """
    weight = weight.float()
    low, high = scheme.code_range
    smallest = weight.amin(dim=1, keepdim=True).clamp(max=0)
    largest = weight.amax(dim=1, keepdim=True).clamp(min=0)
    if scheme.symmetric:
        scale = torch.maximum(-smallest, largest) / ((high - low) / 2)
    else:
        scale = (largest - smallest) / (high - low)
    scale = scale.to(scale_dtype).float()
    if scale_bits is not None:
        scale = _shortened(scale.half().float(), scale_bits)
    # A power of two, which has all its bits in every type. float16 ends at 6e-8.
    scale = scale.masked_fill(scale == 0, torch.finfo(scale_dtype).eps)
    if scheme.symmetric:
        return scale, torch.zeros_like(scale, dtype=torch.int8)
    zero_point = (low - smallest / scale).round().clamp(low, high)
    return scale, zero_point.to(torch.int8)


def half_scale_bits(scheme: QuantScheme) -> int:
    """Significant bits of scales of which nothing is lost where float16 numbers describe a group.

    float16 has eleven. Grids of up to five bits with a zero point are kept as a scale and the
    smallest value (GGUF's Q4_1, Q5_1), which is the scale times a number of ``bits`` bits.
    """
    return 11 if scheme.symmetric or scheme.bits > 5 else 11 - scheme.bits


def _shortened(values: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest numbers of so many significant bits."""
    significand, exponent = torch.frexp(values)
    return torch.ldexp((significand * 2**bits).round_() / 2**bits, exponent)


def find_group_qparams(
    weight: torch.Tensor,
    scheme: QuantScheme,
    scale_dtype: torch.dtype = torch.float32,
    scale_bits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`find_qparams` for a whole matrix [out, in]: scale and zero point [out, groups].

    Raises:
        CompressError: the group size does not divide the input width.
    """
    rows, columns = weight.shape
    groups = scheme.groups(columns)
    flat = weight.reshape(rows * groups, -1)
    scale, zero_point = find_qparams(flat, scheme, scale_dtype, scale_bits)
    return scale.view(rows, groups), zero_point.view(rows, groups)


def quantize(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    scheme: QuantScheme,
) -> torch.Tensor:
    """Round to the nearest codes.

    Args:
        weight: [out, in].
        scale, zero_point: [out, groups] with groups dividing in; zero_point None means zeros.

    Returns:
        Codes [out, in], int8.
    """
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    step = max(1, _PIECE // max(weight.shape[1], 1))
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        part = weight[rows].float().unflatten(1, (scale.shape[1], -1))
        part = part / scale[rows].float().unsqueeze(-1)
        if zero_point is not None:
            part += zero_point[rows].to(part.dtype).unsqueeze(-1)
        codes[rows] = part.round_().clamp_(*scheme.code_range).flatten(1)
    return codes


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the weights [out, in], float32, that the codes [out, in] stand for."""
    values = codes.float().unflatten(1, (scale.shape[1], -1))
    if zero_point is not None:
        values -= zero_point.to(values.dtype).unsqueeze(-1)
    return values.mul_(scale.float().unsqueeze(-1)).flatten(1)


def fake_quantize(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    scheme: QuantScheme,
) -> torch.Tensor:
    """Return the nearest weights on the grid, float32; shapes as in :func:`quantize`."""
    return dequantize(quantize(weight, scale, zero_point, scheme), scale, zero_point)


def fake_quantize_tokens(inputs: torch.Tensor) -> torch.Tensor:
    """Round activations [batch, tokens, features] to symmetric int8, one scale a token.

    A matrix [n, features] (OPT flattens its batches) gets one scale altogether, because that is
    what compressed-tensors does with it, and with it stock transformers.

    The gradient passes as if nothing were rounded (Bengio et al. 2013, arXiv 1308.3432), or nothing
    in front of such a linear could learn.
    """
    return _RoundedTokens.apply(inputs)


class _RoundedTokens(torch.autograd.Function):
    @staticmethod
    def forward(_ctx, inputs):
        return _rounded_tokens(inputs)

    @staticmethod
    def backward(_ctx, grad):
        return grad


def _rounded_tokens(inputs: torch.Tensor) -> torch.Tensor:
    codes, scale = token_codes(inputs)
    return codes.mul_(scale)


def token_codes(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes that :func:`fake_quantize_tokens` rounds to, whole numbers from -128 to 127 in the
    type of the inputs, and their scales [batch, tokens, 1] (one number for a matrix)."""
    largest = inputs.abs()
    largest = largest.amax() if inputs.dim() == 2 else largest.amax(dim=-1, keepdim=True)
    scale = largest / 127.5
    scale = scale.masked_fill(scale == 0, torch.finfo(scale.dtype).eps)
    return (inputs / scale).clamp_(-128, 127).round_(), scale
