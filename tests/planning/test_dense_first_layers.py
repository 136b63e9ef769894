"""Mixtures whose first layers are dense: which layers go, what config.json says of those left."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import compress
from compress.errors import CompressError

_SIZES = {
    "vocab_size": 264, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 32,
    "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
_LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "n_group": 1, "topk_group": 1,
}  # fmt: skip
# Model type -> field that says which layers are dense, all the others.
KINDS = {
    "Glm4Moe": ("first_k_dense_replace", {**_ROUTED, "head_dim": 8}),
    "Dots1": ("first_k_dense_replace", {**_ROUTED, "head_dim": 8}),
    "DeepseekV2": ("first_k_dense_replace", {**_ROUTED, **_LATENT, "q_lora_rank": None}),
    "DeepseekV3": (
        "first_k_dense_replace", {**_ROUTED, **_LATENT, "q_lora_rank": 16, "head_dim": 4},
    ),
    "Ernie4_5_Moe": (
        "moe_layer_start_index", {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1},
    ),
    "Lfm2Moe": (
        "num_dense_layers",
        {"num_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 5},
    ),
    "Qwen2Moe": (
        "mlp_only_layers",
        {"num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 32},
    ),
}  # fmt: skip


def mixture(kind: str, dense: int, **fields) -> transformers.PreTrainedModel:
    """A random model whose first ``dense`` layers have no experts."""
    torch.manual_seed(0)
    name, others = KINDS[kind]
    told = {name: list(range(dense)) if name == "mlp_only_layers" else dense}
    config = getattr(transformers, f"{kind}Config")(**{**_SIZES, **others, **told, **fields})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@torch.no_grad()
def without(model: transformers.PreTrainedModel, gone: list[int], ids: torch.Tensor):
    """Logits of a model whose forward skips layers."""
    kept = [layer for index, layer in enumerate(model.model.layers) if index not in gone]
    model.model.layers = nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    return model(input_ids=ids, use_cache=False).logits


@pytest.fixture
def stored(tmp_path, tokenizer):
    """``stored(model)``: a folder with it."""

    def make(model: transformers.PreTrainedModel):
        model.save_pretrained(tmp_path / "source")
        tokenizer.save_pretrained(tmp_path / "source")
        return tmp_path / "source"

    return make


@pytest.mark.parametrize(
    ("dense", "gone", "left"), [(1, [0], 0), (1, [1], 1), (3, [1, 3], 2), (3, [3], 3)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_config_tells_which_layers_are_left(kind, dense, gone, left, tokens, helpers, tmp_path):
    model, field = mixture(kind, dense), KINDS[kind][0]
    expected = without(mixture(kind, dense), gone, tokens)
    compress.apply(model, [{"method": "drop_blocks", "blocks": gone}], tokens)
    told = getattr(model.config, field)
    assert told == (list(range(left)) if isinstance(told, list) else left)
    assert helpers.difference(helpers.logits(model, tokens), expected) < 1e-5
    compress.save(model, tmp_path / "saved")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert helpers.difference(helpers.logits(loaded, tokens), expected) < 1e-5


@pytest.mark.parametrize(
    ("kind", "dense", "step", "left"),
    [
        ("Glm4Moe", 1, {"method": "drop_blocks", "blocks": [0]}, 0),
        ("Glm4Moe", 3, {"method": "shortgpt", "remove": 1}, 2),
        ("Ernie4_5_Moe", 1, {"method": "sleb", "remove": 1}, 0),
        ("DeepseekV3", 3, {"method": "shortgpt", "remove": 1, "protect_first": 3}, 3),
    ],
    ids=lambda value: value["method"] if isinstance(value, dict) else str(value),
)
def test_a_run_writes_what_loads(kind, dense, step, left, tokens, text, stored, helpers, tmp_path):
    model = mixture(kind, dense)
    with torch.no_grad():  # the first block hardly does anything, and goes where it may
        model.model.layers[0].self_attn.o_proj.weight.mul_(1e-3)
        model.model.layers[0].mlp.down_proj.weight.mul_(1e-3)
    recipe = helpers.recipe(stored(model), [step], text)
    result = compress.run(recipe, tmp_path / "run")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(result.model)
    assert getattr(loaded.config, KINDS[kind][0]) == left
    stay = [layer.input_layernorm.weight for layer in loaded.model.layers]
    gone = [
        index
        for index, layer in enumerate(model.model.layers)
        if not any(torch.equal(layer.input_layernorm.weight, weight) for weight in stay)
    ]
    assert len(gone) == 1 and (gone == [0] or "protect_first" in step)
    expected = without(model, gone, tokens)
    assert helpers.difference(helpers.logits(loaded, tokens), expected) < 1e-5


@pytest.mark.parametrize(
    "step", [{"method": "drop_blocks", "blocks": [0]}, {"method": "shortgpt", "remove": 1}]
)
def test_what_the_config_cannot_tell_is_refused_at_once(step, tokens):
    model = mixture("Ernie4_5_Moe", 1, num_hidden_layers=6, moe_layer_interval=5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CompressError, match="block 4 of ernie4_5_moe, which would be block 3"):
        compress.apply(model, [step], tokens)
    assert len(model.model.layers) == 6
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "step",
    [
        {"method": "drop_blocks", "blocks": [5]},
        {"method": "shortgpt", "remove": 1, "protect_first": 5},
    ],
)
def test_what_stays_at_its_place_may_be_of_any_build(step, tokens):
    model = mixture("Ernie4_5_Moe", 1, num_hidden_layers=6, moe_layer_interval=5)
    compress.apply(model, [step], tokens)
    assert len(model.model.layers) == model.config.num_hidden_layers == 5


def test_the_last_mixture_of_some_is_counted_among_those_left(tokens, helpers, tmp_path):
    """Layers 1 to 2 have experts, 3 and 4 have none; without those two -1 would stand for all."""
    fields = {"moe_layer_end_index": 2}
    model = mixture("Ernie4_5_Moe", 1, **fields)
    expected = without(mixture("Ernie4_5_Moe", 1, **fields), [1], tokens)
    compress.apply(model, [{"method": "drop_blocks", "blocks": [1]}], tokens)
    assert (model.config.moe_layer_start_index, model.config.moe_layer_end_index) == (1, 1)
    compress.save(model, tmp_path / "saved")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert helpers.difference(helpers.logits(loaded, tokens), expected) < 1e-5
    step = {"method": "drop_blocks", "blocks": [0, 1, 2]}
    with pytest.raises(CompressError, match="block 3 of ernie4_5_moe"):
        compress.apply(mixture("Ernie4_5_Moe", 1, **fields), [step], tokens)


def test_a_first_layer_that_its_class_builds_otherwise_stays(tokens):
    torch.manual_seed(0)
    config = transformers.ModernBertDecoderConfig(
        vocab_size=264, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1,
        sep_token_id=2,
    )  # fmt: skip
    model = transformers.ModernBertDecoderForCausalLM(config).eval()
    with pytest.raises(CompressError, match="which would be block 0"):
        compress.apply(model, [{"method": "shortgpt", "remove": 1}], tokens)
    compress.apply(model, [{"method": "shortgpt", "remove": 1, "protect_first": 1}], tokens)
    assert len(model.model.layers) == 2


@pytest.mark.parametrize("kind", ["Glm4Moe", "Ernie4_5_Moe"])
@pytest.mark.parametrize("dense", [1, 4])
def test_shared_experts_of_a_width_of_their_own_keep_their_neurons(
    kind, dense, text, stored, helpers
):
    """Also where more layers are dense than a miniature has layers."""
    source = stored(mixture(kind, dense, num_hidden_layers=6))
    recipe = helpers.recipe(source, [{"method": "ffn_width", "share": 0.25}], text)
    with pytest.raises(CompressError, match="neurons that can go one by one.*as wide as"):
        compress.plan(recipe)
