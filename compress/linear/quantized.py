"""A linear whose weight lies on an integer grid."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from compress.linear.grid import (
    QuantScheme,
    dequantize,
    fake_quantize_tokens,
    find_group_qparams,
    quantize,
)
from compress.linear.matrix import copy_marks


class QuantizedLinear(nn.Linear):
    """A linear whose weight lies on an integer grid; computes in floats like any other.

    ``weight`` [out, in] holds the dequantised values. The buffers ``weight_scale`` [out, groups]
    (float32) and, where asymmetric, ``weight_zero_point`` [out, groups] (int8) hold the grid, from
    which the codes are recovered exactly. With ``scheme.activation_bits`` the input is rounded as
    the integer kernels of a deployment would round it.
    """

    weight_scale: torch.Tensor
    weight_zero_point: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: QuantScheme,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.scheme = scheme
        shape = (out_features, scheme.groups(in_features))
        self.register_buffer("weight_scale", torch.ones(shape, device=device))
        zero_point = None
        if not scheme.symmetric:
            zero_point = torch.zeros(shape, dtype=torch.int8, device=device)
        self.register_buffer("weight_zero_point", zero_point)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        scheme: QuantScheme,
        scale: torch.Tensor | None = None,
        zero_point: torch.Tensor | None = None,
    ) -> QuantizedLinear:
        """Round a linear to the nearest values of a grid.

        Args:
            linear: its weight, already on the grid or not; its bias is shared, not copied.
            scale, zero_point: the grid [out, groups]; without them it is fitted to the weight.

        Raises:
            CompressError: the group size does not divide the input width.
        """
        if scale is None:
            scale, zero_point = find_group_qparams(linear.weight.data, scheme)
        new = cls(
            linear.in_features,
            linear.out_features,
            scheme,
            bias=linear.bias is not None,
            device="meta",
            dtype=linear.weight.dtype,
        )
        new.bias = linear.bias
        new.set_codes(
            quantize(linear.weight.data, scale, zero_point, scheme),
            scale,
            None if scheme.symmetric else zero_point,
        )
        copy_marks(linear, new)
        return new.train(linear.training)

    def set_codes(
        self, codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None
    ) -> None:
        """Set grid and weight from codes [out, in]; the weight keeps its dtype."""
        weight = dequantize(codes, scale, zero_point).to(self.weight.dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = scale.float()
        self.weight_zero_point = zero_point

    def quantized_values(self) -> torch.Tensor:
        """Return the codes [out, in], int8."""
        return quantize(self.weight.data, self.weight_scale, self.weight_zero_point, self.scheme)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.scheme.activation_bits is not None:
            inputs = fake_quantize_tokens(inputs)
        return functional.linear(inputs, self.weight, self.bias)


def scheme_of(module: nn.Module) -> QuantScheme | None:
    """The scheme of a linear that lies on a grid; None for any other module."""
    return module.scheme if isinstance(module, QuantizedLinear) else None


def quantized_parts(module: nn.Module) -> bool:
    """Whether a module, or anything in it, lies on a grid."""
    return any(scheme_of(m) is not None for m in module.modules())
