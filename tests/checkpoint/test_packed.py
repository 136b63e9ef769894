"""Weights that stay packed give the product of the unpacked ones, whatever computes it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import compress
from compress.eval.cost import macs_per_token, size
from compress.linear import bags, int8, packed, tinygemm
from compress.linear.grid import QuantScheme
from compress.linear.int8 import Int8Linear
from compress.linear.layer import is_layer
from compress.linear.packed import PackedLinear
from compress.linear.quantized import QuantizedLinear
from compress.linear.semi_structured import describe_execution

SCHEMES = [
    QuantScheme(bits=2, group_size=16),
    QuantScheme(bits=3, group_size=None, symmetric=False),
    QuantScheme(bits=4, group_size=16, symmetric=False),
    QuantScheme(bits=4, group_size=None),
    QuantScheme(bits=8, group_size=48, symmetric=False),
]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def quantized(scheme, inputs=48, outputs=27):
    torch.manual_seed(0)
    return QuantizedLinear.from_linear(nn.Linear(inputs, outputs), scheme)


def packed_of(linear):
    grid = linear.quantized_values(), linear.weight_scale, linear.weight_zero_point
    return PackedLinear(*grid, linear.scheme, linear.bias)


def difference(found, expected):
    found, expected = found.detach().float(), expected.detach().float()
    return float((found - expected).abs().max() / expected.abs().max())


# What the kernels for GPUs hold; of three widths of their tiles.
TILED = [
    (QuantScheme(bits=4, group_size=32), 96, 16),
    (QuantScheme(bits=3, group_size=64, symmetric=False), 64, 32),
    (QuantScheme(bits=4, group_size=128, symmetric=False), 256, 64),
]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    ),
]


@pytest.fixture(params=["added up", "multiplied", "no kernels"])
def way(request, monkeypatch):
    """Each of the ways to a product of few rows."""
    if request.param == "no kernels":
        for module in (bags, packed):
            monkeypatch.setattr(module, "kernels", lambda _device: False)
    else:
        number = ("added up", "multiplied").index(request.param)
        monkeypatch.setattr(packed, "fastest", lambda _key, routes, _inputs: routes[number])


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_product_is_that_of_the_unpacked_weights(scheme, way):
    linear = quantized(scheme)
    layer = packed_of(linear)
    assert torch.equal(layer.dense(), linear.weight)
    assert torch.equal(layer.codes(), linear.quantized_values())
    for dtype, tolerance in TOLERANCE.items():
        for rows in (1, 2, 40):
            inputs = torch.randn(rows, 3, 48).to(dtype)
            expected = linear(inputs.float())
            found = layer(inputs)
            assert found.dtype == dtype and found.shape == expected.shape
            assert difference(found, expected) < tolerance
    assert layer(torch.empty(0, 48)).shape == (0, 27)


def test_large_layers_are_unpacked_a_piece_at_a_time(monkeypatch):
    linear = quantized(SCHEMES[2])
    layer = packed_of(linear)
    monkeypatch.setattr(packed, "_PIECE", 16 * 27)
    inputs = torch.randn(50, 48)
    assert difference(layer(inputs), linear(inputs)) < 1e-5
    assert layer.size().nonzero == int(linear.weight.count_nonzero())


def test_gradients_reach_the_inputs():
    for scheme in (SCHEMES[2], QuantScheme(bits=8, activation_bits=8)):
        linear = quantized(scheme)
        layer = packed_of(linear)
        if scheme.activation_bits:
            layer = Int8Linear(linear.quantized_values(), linear.weight_scale, linear.bias)
        gradients = []
        for module in (linear, layer):
            inputs = torch.linspace(-1, 2, 96).view(1, 2, 48).requires_grad_()
            module(inputs).square().sum().backward()
            gradients.append(inputs.grad)
        assert difference(gradients[1], gradients[0]) < 1e-5


@pytest.mark.parametrize("product", ["_whole", "_halves", "_floats"])
def test_integers_are_multiplied_exactly(product, monkeypatch):
    product = getattr(int8, product)
    if product is not int8._floats and not int8._right(product, torch.device("cpu")):
        product = int8._floats  # as the layer would
    monkeypatch.setattr(int8, "_exact", lambda _device: (product,))
    linear = quantized(QuantScheme(bits=8, activation_bits=8))
    layer = Int8Linear(linear.quantized_values(), linear.weight_scale, linear.bias)
    for dtype, tolerance in TOLERANCE.items():
        for shape in ((1, 1, 48), (2, 40, 48), (5, 48)):
            inputs = torch.randn(shape).to(dtype)
            assert difference(layer(inputs), linear.to(dtype)(inputs)) < tolerance
        linear.to(torch.float32)


def test_saturating_products_are_found_out():
    def saturated(rows, weights):
        return torch._int_mm(rows, weights.t()).clamp(-(2**15), 2**15 - 1)

    assert int8._right(int8._floats, torch.device("cpu"))
    assert not int8._right(saturated, torch.device("cpu"))


@pytest.mark.parametrize("what", ["W4 asymmetric", "W8A8", "narrower, low rank, W4"])
def test_a_checkpoint_stays_packed_and_can_be_copied(what, tiny, tmp_path):
    model = tiny.change(tiny.build("llama"), what)
    compress.save(model, tmp_path / "made")
    plain, _ = compress.load(tmp_path / "made", packed=False)
    kept = tiny.auto_class("llama").from_pretrained(tmp_path / "made")
    layers = [m for m in kept.modules() if is_layer(m) and m.execution()]
    linears = sum(isinstance(m, QuantizedLinear) for m in model.modules())
    assert len(layers) == linears
    assert not any(is_layer(m) and m.execution() for m in plain.modules())
    # A code more or less, where rounding activations to int8 is a close call.
    tolerance = 1e-2 if what == "W8A8" else 1e-5
    assert difference(tiny.logits(kept), tiny.logits(plain)) < tolerance
    assert f"in {linears} of {linears + 1} linears" in describe_execution(kept)
    assert size(kept, tmp_path / "made") == size(plain, tmp_path / "made")
    assert macs_per_token(kept, 16) == macs_per_token(plain, 16)
    kept.save_pretrained(tmp_path / "copy")
    made, copy = (load_file(tmp_path / d / "model.safetensors") for d in ("made", "copy"))
    assert all(torch.equal(copy[name], made[name]) for name in copy)
    assert {name for name in made if made[name].numel()} == copy.keys()  # guards are not copied
    again, _ = compress.load(tmp_path / "copy")
    assert torch.equal(tiny.logits(again), tiny.logits(kept))


def test_without_kernels_or_on_other_devices_transformers_unpacks(tiny, tmp_path, monkeypatch):
    compress.save(tiny.change(tiny.build("llama"), "W4"), tmp_path / "made")
    auto = tiny.auto_class("llama")
    kept = auto.from_pretrained(tmp_path / "made", dtype=torch.bfloat16)
    monkeypatch.setattr("compress.checkpoint.serving.kernels", lambda _device: False)
    plain = auto.from_pretrained(tmp_path / "made", dtype=torch.bfloat16)
    assert not any(is_layer(m) for m in plain.modules())
    assert tiny.logits(kept).dtype == torch.bfloat16
    assert difference(tiny.logits(kept), tiny.logits(plain)) < 3e-2
    with pytest.raises(compress.CompressError, match="quantised checkpoint"):
        compress.apply(kept, ["magnitude"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("scheme", "inputs", "outputs"), TILED, ids=str)
def test_few_rows_on_a_gpu_go_through_its_kernel(scheme, inputs, outputs, device, monkeypatch):
    if device == "cpu":  # whose kernel computes the same
        monkeypatch.setattr(tinygemm, "has_kernels", lambda _device: True)
    called = []

    def first(_key, routes, _inputs):
        called.append(routes[0])
        return routes[0]

    monkeypatch.setattr(packed, "fastest", first)
    linear = quantized(scheme, inputs, outputs)
    layer = packed_of(linear).to(device)
    x = torch.randn(20, inputs, dtype=torch.bfloat16)
    with torch.no_grad():
        found = layer(x.to(device)).cpu()
    assert called and found.dtype == torch.bfloat16
    assert difference(found, linear(x.float())) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize(
    ("outputs", "inputs", "bits", "group"),
    ((16, 64, 8, 32), (16, 48, 4, 16), (16, 64, 4, None), (12, 64, 4, 32), (16, 48, 4, 48)),
)
def test_what_the_kernel_does_not_hold(outputs, inputs, bits, group):
    assert not tinygemm.fits(outputs, inputs, bits, group)
