"""Families outside the table: what the plan accepts loads in a process of its own, and no more."""

from __future__ import annotations

import pytest
import torch
import transformers

import compress
from compress.checkpoint.fresh import prove_fresh
from compress.models.anatomy import anatomy_of
from compress.models.families import FAMILIES

_SIZES = {
    "vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GROUPED = {**_SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
MODELS = {
    "arcee": ("ArceeConfig", _GROUPED),
    "exaone4": ("Exaone4Config", _GROUPED),
    "bloom": ("BloomConfig", _SIZES),
    "phi": ("PhiConfig", {**_SIZES, "intermediate_size": 64}),
    "falcon": ("FalconConfig", {**_SIZES, "ffn_hidden_size": 64}),  # one key/value head, unnamed
    "gptj": (  # a table of positions in every block
        "GPTJConfig",
        {"vocab_size": 264, "n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4},
    ),
    "stablelm": ("StableLmConfig", _GROUPED),  # computes the head size from the number of heads
}
# Families that take a kind of step, and one that does not.
ACCEPTED = [
    ("exaone4", [{"method": "head_width", "share": 0.5}, {"method": "svd", "ratio": 0.6}]),
    ("arcee", [{"method": "ffn_width", "share": 0.25}, {"method": "shortgpt", "remove": 1}]),
    ("bloom", [{"method": "svd", "ratio": 0.6}]),
    ("phi", [{"method": "svd", "rank": 8}, {"method": "rtn", "bits": 4, "group_size": 8}]),
    ("falcon", [{"method": "ffn_width", "share": 0.25}]),
    ("gptj", [{"method": "wanda", "pattern": "2:4"}]),
    ("stablelm", [{"method": "head_width", "share": 0.5}]),
]


def build(family: str):
    config, fields = MODELS[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, config)(**fields)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize(("model_type", "steps"), ACCEPTED, ids=[f for f, _ in ACCEPTED])
def test_runs_and_loads_elsewhere(model_type, steps, tokens, tokenizer, text, helpers, tmp_path):
    assert (model_type in FAMILIES) == (model_type == "stablelm")
    build(model_type).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    run = compress.run(helpers.recipe(tmp_path / "source", steps, text), tmp_path / "run")
    model, _ = compress.load(run.model)
    inputs = {"input_ids": tokens[:1]}
    assert prove_fresh(run.model, helpers.logits(model, tokens[:1]), inputs) < 1e-5


@pytest.mark.parametrize("kind", ["ffn_width", "head_width"])
def test_widths_that_no_config_field_says_are_refused(kind, tokens):
    model = build("bloom")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(compress.CompressError, match="bloom"):
        compress.apply(model, [{"method": kind, "share": 0.5}], tokens)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_linears_that_no_packed_checkpoint_can_hold_are_refused(tokens):
    with pytest.raises(compress.CompressError, match="packed checkpoint"):
        compress.apply(build("falcon"), [{"method": "rtn", "bits": 4, "group_size": 8}], tokens)


def test_a_live_model_runs_after_its_widths_changed(tokens):
    model = compress.apply(build("falcon"), [{"method": "ffn_width", "share": 0.25}], tokens)
    assert model(input_ids=tokens[:1]).logits.isfinite().all()


def test_kinds_that_a_class_of_the_table_cannot_load_are_refused(tiny, tokens):
    with pytest.raises(compress.CompressError, match="gpt_neox"):
        compress.apply(tiny("gpt_neox"), [{"method": "head_width", "share": 0.5}], tokens)


def test_widths_are_read_off_the_modules():
    anatomy = anatomy_of(build("exaone4"))
    assert {tuple(block.widths.values()) for block in anatomy.blocks} == {(4, 2, 64)}
