"""Our grid is compressed-tensors' grid, and packing loses nothing."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from compress.checkpoint.packing import pack, storage_format, unpack
from compress.errors import CompressError
from compress.linear.grid import (
    QuantScheme,
    dequantize,
    fake_quantize,
    fake_quantize_tokens,
    find_group_qparams,
    quantize,
)
from compress.linear.matrix import linear_from_conv1d
from compress.linear.quantized import QuantizedLinear

SCHEMES = [
    QuantScheme(bits=bits, group_size=group, symmetric=symmetric)
    for bits in (2, 3, 4, 5, 8)
    for group in (None, 16)
    for symmetric in (True, False)
] + [QuantScheme(bits=8, activation_bits=8)]


def weights(rows=24, columns=48):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    weight[0] = 0  # a row whose range is empty
    weight[1] = weight[1].abs()
    weight[:, ::3] = 0
    return weight


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_grid_is_that_of_compressed_tensors(scheme):
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize as theirs
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(
        num_bits=scheme.bits,
        symmetric=scheme.symmetric,
        strategy="channel" if scheme.group_size is None else "group",
        group_size=scheme.group_size,
    )
    weight = weights()
    groups = weight.unflatten(1, (-1, scheme.group_size or weight.shape[1]))
    expected_scale, expected_zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    scale, zero_point = find_group_qparams(weight, scheme)
    assert torch.equal(scale, expected_scale)
    used = groups.abs().amax(-1) > 0  # theirs is 0/0 in a group of zeros; any zero point will do
    assert torch.equal(zero_point[used].float(), expected_zero[used].float())
    ours = fake_quantize(weight, scale, zero_point, scheme)
    assert torch.equal(ours, theirs(weight, scale, zero_point, args))
    assert (ours[weight == 0] == 0).all()  # what was pruned stays pruned


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_unpacking_gives_back_every_bit(scheme, dtype):
    linear = nn.Linear(48, 24)
    linear.weight.data = weights()
    scale, zero_point = find_group_qparams(linear.weight.data, scheme, dtype)
    module = QuantizedLinear.from_linear(linear, scheme, scale, zero_point)
    codes, scale_again, zero_again = unpack(pack(module, dtype), scheme, (24, 48))
    assert torch.equal(codes, module.quantized_values())
    assert torch.equal(dequantize(codes, scale_again, zero_again), module.weight.data)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_packed_tensors_are_those_of_compressed_tensors(scheme):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    from compress.checkpoint.tensors_config import _scheme_to_args

    linear = nn.Linear(48, 24)
    linear.weight.data = weights()
    module = QuantizedLinear.from_linear(linear, scheme)
    state = {"weight": module.weight.data, "weight_scale": module.weight_scale}
    if module.weight_zero_point is not None:
        state["weight_zero_point"] = module.weight_zero_point
    compressor = BaseCompressor.get_value_from_registry(storage_format(scheme))
    args = QuantizationScheme(targets=["Linear"], **_scheme_to_args(scheme))
    expected = compressor.compress(state, args)
    packed = pack(module, torch.float32)
    assert packed.keys() == expected.keys()
    assert all(torch.equal(packed[n], expected[n]) for n in packed)


def test_rounding_twice_changes_nothing():
    scheme = QuantScheme(bits=3, group_size=16, symmetric=False)
    scale, zero_point = find_group_qparams(weights(), scheme)
    once = fake_quantize(weights(), scale, zero_point, scheme)
    assert torch.equal(fake_quantize(once, scale, zero_point, scheme), once)
    assert quantize(once, scale, zero_point, scheme).dtype == torch.int8


def test_tokens_are_rounded_one_by_one():
    tokens = torch.tensor([[[1.0, 0.1, -0.3], [100.0, 10.0, 3.0]]])
    alone = fake_quantize_tokens(tokens[:, :1])
    assert torch.equal(fake_quantize_tokens(tokens)[:, :1], alone)
    assert (fake_quantize_tokens(tokens) - tokens).abs().amax(-1).tolist()[0][0] <= 1 / 255
    assert torch.equal(fake_quantize_tokens(torch.zeros(1, 2, 3)), torch.zeros(1, 2, 3))


def test_group_must_divide():
    with pytest.raises(CompressError, match="divides"):
        QuantizedLinear.from_linear(nn.Linear(30, 4), QuantScheme(bits=4, group_size=16))


@pytest.mark.parametrize(
    "bad", [{"bits": 1}, {"bits": 9}, {"bits": 4, "group": 3},
            {"bits": 8, "symmetric": False, "activation_bits": 8}],
)  # fmt: skip
def test_bad_schemes_are_refused(bad):
    with pytest.raises(ValidationError):
        QuantScheme(**bad)


def test_conv1d_becomes_the_same_linear():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    conv = Conv1D(6, 4)
    conv.zeros = "2:4"
    inputs = torch.randn(2, 3, 4)
    linear = linear_from_conv1d(conv)
    assert torch.allclose(linear(inputs), conv(inputs), atol=1e-6)
    assert linear.zeros == "2:4" and linear.was_conv1d
