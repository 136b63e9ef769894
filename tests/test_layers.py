"""Layers of other people: described, saved, loaded, planned and refused like the toolkit's own."""

from __future__ import annotations

from typing import ClassVar, Literal

import pytest
import torch
from torch import nn
from torch.nn import functional

import compress
from compress.linear import layer as contract
from compress.linear.layer import Layer, LayerSize, LayerSpec, register_layer
from compress.models.anatomy import anatomy_of
from compress.models.outline import outline_of


class SumSpec(LayerSpec):
    kind: Literal["test_sum"] = "test_sum"
    keep: int


class SumLinear(Layer):
    """The first ``keep`` columns as int8 codes with a scale, the others in floating point: a layer
    that is not made of linears."""

    kind: ClassVar[str] = "test_sum"
    Spec: ClassVar[type[LayerSpec]] = SumSpec

    def __init__(self, out_features, in_features, keep, bias, device=None, dtype=None):
        super().__init__()
        self.in_features, self.out_features, self.keep = in_features, out_features, keep
        self.register_buffer(
            "codes", torch.zeros(out_features, keep, dtype=torch.int8, device=device)
        )
        self.scale = nn.Parameter(torch.zeros(out_features, 1, device=device, dtype=dtype))
        rest = torch.zeros(out_features, in_features - keep, device=device, dtype=dtype)
        self.rest = nn.Parameter(rest)
        bias = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.bias = None if bias is None else nn.Parameter(bias)

    @classmethod
    def of(cls, linear: nn.Linear, keep: int) -> SumLinear:
        weight = linear.weight.data
        new = cls(*weight.shape, keep, linear.bias is not None)
        new.scale.data = weight[:, :keep].abs().amax(1, keepdim=True) / 127
        new.codes = (weight[:, :keep] / new.scale.data).round().to(torch.int8)
        new.rest.data = weight[:, keep:].clone()
        new.bias = linear.bias
        return new

    def spec(self):
        return SumSpec(keep=self.keep)

    @classmethod
    def build(cls, spec, like):
        return cls(
            like.out_features, like.in_features, spec.keep, like.bias, like.device, like.dtype
        )

    def dense(self):
        return torch.cat([self.codes * self.scale, self.rest], 1)

    def size(self):
        count = self.codes.numel() + self.rest.numel()
        return LayerSize(count, count, 2 * count)

    def forward(self, inputs):
        return functional.linear(inputs, self.dense(), self.bias)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setattr(contract, "_KINDS", dict(contract._KINDS))
    register_layer(SumLinear)


@pytest.fixture
def model(tiny):
    model = tiny("llama")
    block = model.model.layers[1]
    block.mlp.down_proj = SumLinear.of(block.mlp.down_proj, 8)
    return model


def test_it_is_saved_and_loads_with_equal_logits(model, tokens, helpers, tmp_path):
    compress.save(model, tmp_path / "saved")
    again, _ = compress.load(tmp_path / "saved")
    assert isinstance(again.model.layers[1].mlp.down_proj, SumLinear)
    assert again.model.layers[1].mlp.down_proj.codes.dtype == torch.int8
    assert torch.equal(helpers.logits(again, tokens), helpers.logits(model, tokens))


def test_a_class_that_does_not_know_it_raises(model, tmp_path):
    compress.save(model, tmp_path / "saved")
    with pytest.raises(RuntimeError):
        type(model).from_pretrained(tmp_path / "saved")


def test_its_size_is_its_own_word(model):
    anatomy = anatomy_of(model)
    outline = outline_of(model, anatomy, 32)
    name = "mlp.down_proj"
    plain, layer = (outline.blocks[i].linears[name] for i in (0, 1))
    assert layer.weights == plain.weights and layer.macs == 2 * plain.macs
    assert layer.layer == "test_sum" and not layer.matrices


@pytest.mark.parametrize(
    "step",
    [
        {"method": "magnitude", "pattern": "2:4"},
        {"method": "rtn", "bits": 4, "group_size": 8},
        {"method": "svd", "ratio": 0.5},
        {"method": "ffn_width", "share": 0.5},
    ],
    ids=lambda step: step["method"],
)
def test_steps_that_need_linears_refuse_it_and_leave_the_model_alone(step, model, tokens, helpers):
    before = helpers.logits(model, tokens)
    with pytest.raises(compress.CompressError, match="test_sum"):
        compress.apply(model, [step], tokens)
    assert torch.equal(helpers.logits(model, tokens), before)


def test_other_steps_leave_it_out(model, tokens, helpers):
    step = {"method": "wanda", "pattern": "2:4", "exclude": ["*down_proj"]}
    compress.apply(model, [step], tokens)
    assert isinstance(model.model.layers[1].mlp.down_proj, SumLinear)


def test_a_tensor_under_the_name_of_the_linears_weight_is_refused(model, tmp_path):
    model.model.layers[1].mlp.down_proj.weight = nn.Parameter(torch.zeros(3))
    with pytest.raises(compress.CompressError, match="another name"):
        compress.save(model, tmp_path / "saved")


def test_a_kind_stands_for_one_class():
    class Other(SumLinear):
        pass

    with pytest.raises(compress.CompressError, match="test_sum"):
        register_layer(Other)


def test_a_checkpoint_of_an_unknown_kind_says_so(model, tmp_path, monkeypatch):
    compress.save(model, tmp_path / "saved")
    monkeypatch.delitem(contract._KINDS, "test_sum")
    with pytest.raises(compress.CompressError, match="test_sum"):
        compress.load(tmp_path / "saved")
