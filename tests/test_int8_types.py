"""int8 linears in types that cannot hold sums of codes, and packed ones whose table changes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from compress.linear import int8, packed, tinygemm
from compress.linear.grid import QuantScheme, find_group_qparams, quantize
from compress.linear.int8 import Int8Linear
from compress.linear.packed import PackedLinear

WIDTH = 4096


@pytest.fixture
def layer() -> Int8Linear:
    """Of weights that are alike, with inputs that are: sums of codes are as large as can be."""
    codes = torch.full((8, WIDTH), 120, dtype=torch.int8)
    return Int8Linear(codes, torch.full((8, 1), 1e-5))


@pytest.fixture
def floats(monkeypatch) -> None:
    """A processor that does not multiply int8."""
    monkeypatch.setattr(int8, "_exact", lambda _device: (int8._floats,))


def expected(layer: Int8Linear, inputs: torch.Tensor) -> torch.Tensor:
    return inputs.float() @ layer.dense().t()


@pytest.mark.usefixtures("floats")
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("learns", (False, True))
def test_autocast_sums_in_float32(dtype, learns, layer):
    inputs = torch.linspace(0.5, 1, WIDTH).repeat(1, 3, 1).requires_grad_(learns)
    with torch.autocast("cpu", dtype):
        found = layer(inputs)
    torch.testing.assert_close(found, expected(layer, inputs), rtol=5e-3, atol=0)
    plain = layer(inputs)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_gradients_in_16_bits(dtype, layer):
    inputs = torch.linspace(0.5, 1, WIDTH).repeat(1, 3, 1).to(dtype).requires_grad_()
    found = layer(inputs)
    torch.testing.assert_close(found.float(), expected(layer, inputs), rtol=2e-2, atol=0)
    (found.float() * 1e-3).sum().backward()
    wanted = (layer.dense() * 1e-3).sum(0).expand_as(inputs)
    torch.testing.assert_close(inputs.grad.float(), wanted, rtol=2e-2, atol=0)


@pytest.mark.parametrize("module", (int8, packed))
def test_times_are_kept_by_type_and_device(module, monkeypatch):
    keys = []

    def first(key, routes, _inputs):
        keys.append(key)
        return routes[0]

    monkeypatch.setattr(module, "fastest", first)
    if module is int8:
        monkeypatch.setattr(int8, "_exact", lambda _device: (int8._floats, int8._floats))
        layer = Int8Linear(torch.ones(8, 64, dtype=torch.int8), torch.ones(8, 1))
    else:
        monkeypatch.setattr(packed, "kernels", lambda _device: True)
        layer = tiled()
    for dtype in (torch.float32, torch.bfloat16):
        layer(torch.ones(1, 2, 64, dtype=dtype))
    assert all(torch.device("cpu") in key for key in keys)
    types = [{part for part in key if isinstance(part, torch.dtype)} for key in keys]
    wanted = [torch.int8] * 2 if module is int8 else [torch.float32, torch.bfloat16]
    assert types == [{dtype} for dtype in wanted]


def tiled(seed: int = 0) -> PackedLinear:
    """A packed linear that fits the kernel for GPUs."""
    scheme = QuantScheme(bits=4, group_size=32)
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(seed))
    scale, zero_point = find_group_qparams(weight, scheme)
    return PackedLinear(quantize(weight, scale, zero_point, scheme), scale, None, scheme)


@pytest.fixture
def kernel(monkeypatch) -> None:
    """The kernel's twin for CPUs, whatever is faster."""
    monkeypatch.setattr(packed, "kernels", lambda _device: False)
    monkeypatch.setattr(tinygemm, "has_kernels", lambda _device: True)
    monkeypatch.setattr(packed, "fastest", lambda _key, routes, _inputs: routes[0])


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("how", ("loaded", "replaced", "scaled"))
def test_tiles_are_of_the_table_as_it_is(how):
    layer, other = tiled(), tiled(1)
    inputs = torch.randn(1, 2, 64, dtype=torch.bfloat16)
    layer(inputs)
    if how == "loaded":
        layer.load_state_dict(other.state_dict())
    elif how == "replaced":
        layer.table, layer.scale = other.table, other.scale
    else:
        layer.scale.mul_(3)
    found, wanted = layer(inputs).float(), inputs.float() @ layer.dense().t()
    assert float((found - wanted).norm() / wanted.norm()) < 2e-2


@pytest.mark.usefixtures("kernel")
def test_tiles_stay_where_they_were_made():
    layer, inputs = tiled(), torch.randn(1, 2, 64, dtype=torch.bfloat16)
    layer(inputs)
    kept = layer._tiles
    layer(inputs)
    assert kept is not None and layer._tiles is kept  # made once
    assert copy.deepcopy(layer)._tiles is None
    assert pickle.loads(pickle.dumps(layer))._tiles is None
    assert nn.Sequential(layer).to("cpu")[0]._tiles is None
