"""Concrete classes do not look at a config's model type: what a low-rank result does to them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, LlamaForCausalLM, LlamaModel

from compress.checkpoint.save import save_model


@pytest.fixture(scope="module")
def factorised(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("guards") / "model"
    model = tiny.change(tiny.build("llama"), "low rank")
    save_model(model, folder)
    return folder, tiny.logits(model)


@pytest.mark.parametrize("cls", [LlamaForCausalLM, LlamaModel])
def test_a_stock_class_raises(cls, factorised):
    with pytest.raises(RuntimeError, match="mismatch"):
        cls.from_pretrained(factorised[0])


def test_a_packed_conv1d_too(tiny, tmp_path):
    save_model(tiny.change(tiny.build("gpt2"), "W4"), tmp_path)
    with pytest.raises((RuntimeError, ValueError)):
        GPT2LMHeadModel.from_pretrained(tmp_path)


def test_checkpoints_from_before_there_were_guards_load(factorised, tiny, tmp_path):
    folder, expected = factorised
    weights = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if v.numel()}, tmp_path / "model.safetensors",
        {"format": "pt"},
    )  # fmt: skip
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(tiny.logits(again), expected)
