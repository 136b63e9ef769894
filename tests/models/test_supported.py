"""What kinds of models and weights are refused, and what is said of those that are taken."""

from __future__ import annotations

import json
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import compress

PRUNE = {"method": "wanda", "pattern": "2:4"}
ROUND = {"method": "rtn", "bits": 4, "group_size": 16}
_SIZES = {"vocab_size": 264, "d_model": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize("name", ["Bart", "T5"])
def test_an_encoder_with_a_decoder_is_refused_and_left_alone(name, tokens, tmp_path):
    config = getattr(transformers, f"{name}Config")(
        **_SIZES, encoder_layers=2, decoder_layers=2, num_layers=2, num_heads=4, d_ff=64, d_kv=8,
        decoder_start_token_id=1,
    )  # fmt: skip
    cls = getattr(transformers, f"{name}ForConditionalGeneration")
    cls(config).save_pretrained(tmp_path)
    for function in (compress.load, compress.inspect, compress.evaluate):
        with pytest.raises(compress.CompressError, match=f"{name}.*an encoder with a decoder"):
            function(tmp_path)
    with torch.device("meta"):
        model = cls(config)
    with pytest.raises(compress.CompressError, match=f"{name}.*an encoder with a decoder"):
        compress.evaluate(model)
    with pytest.raises(compress.CompressError, match=f"{name}ForConditionalGeneration"):
        compress.apply(model, [PRUNE], tokens)
    assert all(v.startswith("not") for v in compress.inspect(model)["methods"].values())


@pytest.fixture(scope="module")
def mixture():
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config).eval()


def test_experts_that_no_step_reaches_are_told_of(mixture):
    step = {"method": "magnitude", "pattern": "2:4", "exclude": ["*.experts.*"]}
    with pytest.warns(UserWarning, match=r"leaves \d+\.\d % alone"):
        compress.apply(mixture, [step])


def test_inspect_refuses_what_a_step_refuses(mixture):
    methods = compress.inspect(mixture)["methods"]
    assert methods["ffn_width"].startswith("not") and "neurons" in methods["ffn_width"]
    assert methods["magnitude"] == "yes" and type(mixture.model.layers[0].mlp.experts).__name__ == (
        "MixtralExperts"
    )
    with pytest.raises(compress.CompressError, match="neurons"):
        compress.apply(
            mixture, [{"method": "ffn_width", "share": 0.5}], torch.ones(1, 8, dtype=torch.long)
        )


def test_tensors_that_transformers_merges_are_read_and_written_as_it_has_them(mixture, tmp_path):
    mixture.save_pretrained(tmp_path / "stored")
    assert "model.layers.0.mlp.experts.gate_up_proj" in mixture.state_dict()
    stored = load_file(tmp_path / "stored" / "model.safetensors")
    assert "model.layers.0.mlp.experts.gate_up_proj" not in stored  # a file has each by itself
    recipe = {"model": str(tmp_path / "stored"), "steps": [{"method": "magnitude"}]}
    streamed = compress.run(recipe, tmp_path / "run").model
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "stored")
    compress.save(compress.apply(model, [{"method": "magnitude"}]), tmp_path / "made")
    for folder in (streamed, tmp_path / "made"):
        again = transformers.AutoModelForCausalLM.from_pretrained(folder)
        for name, value in model.state_dict().items():
            assert torch.equal(value, again.state_dict()[name]), name


@pytest.fixture(scope="module")
def packed(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "model"
    compress.save(compress.apply(tiny("llama"), [ROUND]), folder)
    return folder


def test_a_packed_model_is_neither_saved_nor_pruned(packed, tmp_path):
    model, _ = compress.load(packed)
    with pytest.raises(compress.CompressError, match="quantised checkpoint"):
        compress.save(model, tmp_path / "again")
    with pytest.raises(compress.CompressError, match="quantised checkpoint"):
        compress.apply(model, [{"method": "magnitude", "pattern": "2:4"}])


@pytest.mark.parametrize(
    "name",
    ["layers.0.mlp.up_proj.weight_packed", "norm.weight", "layers.1.mlp.up_proj.weight_scale"],
)
def test_a_packed_checkpoint_that_lacks_a_tensor(name, packed, tmp_path, helpers):
    weights = load_file(packed / "model.safetensors")
    del weights[f"model.{name}"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((packed / "config.json").read_text())
    with pytest.raises(compress.CompressError, match=name.replace(".", r"\.")):
        compress.load(tmp_path)
    with pytest.raises(compress.CompressError, match=name.replace(".", r"\.")):
        compress.plan(
            helpers.recipe(tmp_path, [{"method": "shortgpt", "remove": 1}], tmp_path / "t")
        )


def change(folder, values, **fields):
    weights = load_file(folder / "model.safetensors")
    weights.update(values(weights))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


@pytest.mark.parametrize(
    "names", [["model.layers.1.self_attn.q_proj.bias"], ["model.layers.3.input_layernorm.weight"]]
)
def test_weights_of_its_layers_without_a_place_are_refused(names, own_checkpoint, helpers):
    folder = own_checkpoint("llama")
    change(folder, lambda _: {name: torch.ones(32) for name in names})
    with pytest.raises(compress.CompressError, match=names[0].replace(".", r"\.")):
        compress.plan(helpers.recipe(folder, [ROUND]))
    with pytest.raises(compress.CompressError, match=names[0].replace(".", r"\.")):
        compress.load(folder)


def test_weights_of_another_head_are_told_of(own_checkpoint, helpers):
    folder = own_checkpoint("llama")
    change(folder, lambda _: {"value_head.weight": torch.ones(32)})
    assert any("value_head" in w for w in compress.plan(helpers.recipe(folder, [ROUND])).warnings)
    with pytest.warns(UserWarning, match="value_head"):
        compress.load(folder)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_values_that_are_not_finite_outside_the_blocks(name, own_checkpoint, helpers, tmp_path):
    folder = own_checkpoint("llama")

    def spoil(weights):
        weights[name].view(-1)[3] = math.nan
        return {}

    change(folder, spoil)
    with pytest.raises(compress.CompressError, match=f"NaN.*{name}"):
        compress.run(helpers.recipe(folder, [ROUND]), tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()


def test_values_that_are_not_finite_in_a_live_model(tiny, tmp_path):
    model = tiny("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = math.inf
    with pytest.raises(compress.CompressError, match="model.norm.weight"):
        compress.apply(model, [ROUND])
    with pytest.raises(compress.CompressError, match="model.norm.weight"):
        compress.save(model, tmp_path / "out")


_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.parametrize("step", [{"method": "magnitude", "pattern": "2:4"}, ROUND])
def test_code_of_the_checkpoint_that_is_allowed(step, own_checkpoint, helpers, tmp_path, tokens):
    """From the plan to the proof, and the result loads."""
    folder = own_checkpoint("llama")
    (folder / "modeling_own.py").write_text(_CODE)
    classes = {"AutoConfig": "OwnConfig", "AutoModelForCausalLM": "OwnForCausalLM"}
    change(
        folder, lambda _: {}, model_type="own", architectures=["OwnForCausalLM"],
        auto_map={auto: f"modeling_own.{name}" for auto, name in classes.items()},
    )  # fmt: skip
    trusted = {"model": {"source": str(folder), "trust_remote_code": True}}
    recipe = {**helpers.recipe(folder, [step]), **trusted}
    run = compress.run(recipe, tmp_path / "run")
    model, _ = compress.load(run.model, trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"
    assert torch.isfinite(helpers.logits(model, tokens)).all()
    with pytest.raises(compress.CompressError, match="whose code comes with the checkpoint"):
        compress.plan({**recipe, "steps": [{"method": "svd", "ratio": 0.5}]})
