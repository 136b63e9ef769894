"""A linear of 8-bit weights and 8-bit activations that multiplies integers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional

from compress.linear.casting import unmixed
from compress.linear.grid import QuantScheme, token_codes
from compress.linear.layer import Layer, LayerSize, LayerSpec, LinearShape
from compress.linear.routes import fastest, watched

# Weights that become floats at once, where integers are not multiplied: 16 MB of float32.
_PIECE = 2**22

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Int8(LayerSpec):
    """A linear is an :class:`Int8Linear`."""

    kind: Literal["int8"] = "int8"


class Int8Linear(Layer):
    """y = (X W) s t: int8 weights with a scale s an output, inputs rounded to int8 with a scale t a
    token, as ``fake_quantize_tokens`` rounds them. For inference.

    Products of integers are exact sums in int32 where the processor multiplies int8 (VNNI, AMX);
    without it oneDNN's sums of two products saturate at 16 bits, so that weights are multiplied in
    two halves, or as floats. Which way is right is tried, and which is fastest measured.

    Attributes:
        codes: [out, in] int8.
        scale: [out] float32.
    """

    kind: ClassVar[str] = "int8"
    Spec: ClassVar[type[LayerSpec]] = Int8

    codes: torch.Tensor
    scale: torch.Tensor
    scheme: ClassVar[QuantScheme] = QuantScheme(bits=8, activation_bits=8)

    def __init__(
        self, codes: torch.Tensor, scale: torch.Tensor, bias: nn.Parameter | None = None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = codes.shape
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("scale", scale.float().flatten().clone())
        self.bias = bias

    @classmethod
    def build(cls, spec: Int8, like: LinearShape) -> Int8Linear:
        rows, device = like.out_features, like.device
        bias = torch.zeros(rows, device=device, dtype=like.dtype)
        return cls(
            torch.zeros(rows, like.in_features, dtype=torch.int8, device=device),
            torch.ones(rows, device=device),
            nn.Parameter(bias) if like.bias else None,
        )

    def spec(self) -> Int8:
        return Int8()

    def execution(self) -> str:
        integers = len(_exact(self.codes.device)) > 1
        return "products of int8" if integers else "int8 weights, multiplied as floats"

    def size(self) -> LayerSize:
        weights = self.codes.numel()
        nonzero = weights if self.codes.is_meta else int(self.codes.count_nonzero())
        return LayerSize(weights, nonzero, weights)

    def dense(self) -> torch.Tensor:
        return self.codes.float().mul_(self.scale.unsqueeze(1))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and inputs.requires_grad:
            codes, scale = _Codes.apply(inputs)
            sums = _floats(codes.reshape(-1, self.in_features), self.codes)
        else:
            codes, scale = token_codes(inputs)
            sums = self._sums(codes.to(torch.int8).view(-1, self.in_features))
        output = (sums.view(*inputs.shape[:-1], self.out_features) * scale.float()) * self.scale
        output = output.to(inputs.dtype)
        return output if self.bias is None else output + self.bias.to(inputs.dtype)

    def _sums(self, rows: torch.Tensor) -> torch.Tensor:
        products = (_floats,) if watched() else _exact(rows.device)
        ways = [functools.partial(_swapped, product, self.codes) for product in products]
        if len(ways) == 1 or not len(rows):
            return ways[-1](rows)
        # Times of neighbouring numbers of rows are alike: a key for each power of two.
        shape = (self.out_features, self.in_features, len(rows).bit_length())
        key = ("int8", *shape, rows.dtype, rows.device, torch.get_num_threads())
        return fastest(key, ways, rows)(rows)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


class _Codes(torch.autograd.Function):
    """Codes, in float32, and scales of tokens; the gradient passes as if nothing were rounded."""

    @staticmethod
    def forward(ctx, inputs):
        codes, scale = token_codes(inputs)
        ctx.save_for_backward(scale)
        ctx.mark_non_differentiable(scale)
        ctx.dtype = inputs.dtype
        return codes.float(), scale

    @staticmethod
    def backward(ctx, grad, _):
        (scale,) = ctx.saved_tensors
        # Of codes it is smaller than of inputs by the scale, too small for float16.
        return (grad / scale.float()).to(ctx.dtype)


def _swapped(product: Product, weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return product(rows, weights)


def _whole(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return torch._int_mm(rows, weights.t())


def _halves(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Of weights up to 64, two products of a shifted row (0 to 255) fit into 16 bits."""
    half = weights >> 1
    sums = torch._int_mm(rows, half.t())
    return sums.add_(torch._int_mm(rows, (weights - half).t()))


def _floats(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """In float32, in autocast as well, since sums of codes reach millions and float16 ends at
    65,504: exact below 2^24, and rounded as any product of floats above."""
    inputs = rows.float()
    step = max(1, _PIECE // max(weights.shape[1], 1))
    with unmixed(rows.device.type):
        pieces = [functional.linear(inputs, part.float()) for part in weights.split(step)]
    return torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]


@functools.cache
def _exact(device: torch.device) -> tuple[Product, ...]:
    """The products of integers that are right on a device; floats always are."""
    return (*(p for p in (_whole, _halves) if _right(p, device)), _floats)


def _right(product: Product, device: torch.device) -> bool:
    """Try the largest codes, and all of them, on one row and on many."""
    codes = (torch.arange(96 * 256) % 256 - 128).to(torch.int8).view(96, 256)
    codes[0], codes[1] = 127, -128
    weights, expected = codes[:64].to(device), (codes.double() @ codes[:64].double().t()).int()
    try:
        many = product(codes.to(device), weights)
        one = product(codes[:1].to(device), weights)
    except (RuntimeError, NotImplementedError):
        return False
    return torch.equal(many.cpu(), expected) and torch.equal(one.cpu(), expected[:1])
