"""A type whose parts have names of their own is described by its user, and then like any other."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import CTRLConfig, CTRLLMHeadModel

import compress
from compress.errors import CompressError
from compress.models import described
from compress.models.anatomy import anatomy_of

CTRL = {
    "roles": {
        "qkv": "W[qkv]", "attention_out": r"multi_head_attention\.dense", "up": r"ffn\.0",
        "down": r"ffn\.2",
    },
    "ffn": "dff",
}  # fmt: skip
STEP = {"method": "ffn_width", "share": 0.25}


@pytest.fixture
def ctrl(tmp_path, tokenizer):
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "dff": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    model = CTRLLMHeadModel(CTRLConfig(vocab_size=264, **sizes)).eval()
    model.save_pretrained(tmp_path / "ctrl")
    tokenizer.save_pretrained(tmp_path / "ctrl")
    return tmp_path / "ctrl"


def recipe(source, text, **model):
    calibration = {"text": {"source": str(text)}, "samples": 4, "length": 24}
    return {"model": {"source": str(source), **model}, "steps": [STEP], "calibration": calibration}


def test_a_recipe_describes_the_family(ctrl, text, tmp_path, forked_python):
    with pytest.raises(CompressError):
        compress.plan(recipe(ctrl, text))
    result = compress.run(recipe(ctrl, text, family=CTRL), tmp_path / "run")
    config = json.loads((result.model / "config.json").read_text())
    assert config["compress_family"] == CTRL and config["dff"] == 48
    written = compress.load(result.model)[0]
    assert [site.kind for site in anatomy_of(written).blocks[0].sites] == [
        "qkv", "attention_out", "up", "down"
    ]  # fmt: skip
    again = compress.plan(recipe(result.model, text))  # which knows from config.json
    assert again.result.parameters < again.original.parameters
    done = forked_python(
        "-c",
        "import sys\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "assert model.transformer.h[0].ffn[0].out_features == 48",
        result.model,
    )
    assert done.returncode == 0, done.stderr


def test_code_describes_it_for_a_live_model(ctrl, tokens, monkeypatch):
    monkeypatch.setattr(described, "_registered", {})
    model = compress.load(ctrl)[0]
    compress.register_family("ctrl", **CTRL)
    compress.apply(model, [STEP], tokens)
    assert model.transformer.h[0].ffn[0].out_features == 48
    assert model.config.compress_family == CTRL
    assert compress.inspect(ctrl)["family"] == "described"


def test_what_is_refused(ctrl, text, checkpoint):
    for family, words in (
        ({"ffn": "width"}, "a field of CTRLConfig as ffn"),
        ({"roles": {"up": "("}}, "a regular expression for up"),
        ({"like": "lama"}, "'llama'"),
        ({"fnn": "dff"}, "Did you mean 'ffn'"),
    ):
        with pytest.raises(CompressError, match=words):
            compress.plan(recipe(ctrl, text, family=family))
    with pytest.raises(CompressError, match="without an entry"):
        compress.plan(recipe(checkpoint("llama"), text, family=CTRL))
    with pytest.raises(CompressError, match="without an entry"):
        compress.register_family("llama", ffn="intermediate_size")
    path = ctrl / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"compress_family": {"ffn": 3}}))
    with pytest.raises(CompressError, match="ffn"):
        compress.plan(recipe(ctrl, text))
