"""Experts that transformers keeps in one tensor are linears to every step: each is solved with the
tokens that were routed to it, and what can be goes back to where the stock class looks for it."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import compress
from compress.errors import CompressError
from compress.models.experts import UnfusedExperts, fuse_all, unfuse_all, unfused_in
from compress.models.stream import StreamedModel, build_meta

_SIZES = {
    "vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2, "pad_token_id": 0,
    "max_position_embeddings": 64,
}  # fmt: skip
KINDS = {
    "Mixtral": {"intermediate_size": 64, "num_local_experts": 4},
    "Qwen2Moe": {"moe_intermediate_size": 32, "num_experts": 4, "intermediate_size": 64,
                 "shared_expert_intermediate_size": 32},
    "Qwen3Moe": {"moe_intermediate_size": 32, "num_experts": 4, "intermediate_size": 64},
    "DeepseekV3": {"moe_intermediate_size": 32, "n_routed_experts": 4, "intermediate_size": 64,
                   "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "n_group": 1,
                   "qk_nope_head_dim": 4, "v_head_dim": 8, "topk_group": 1, "head_dim": 4,
                   "first_k_dense_replace": 1, "n_shared_experts": 1, "num_key_value_heads": 4},
    "GptOss": {"intermediate_size": 64, "num_local_experts": 4},
}  # fmt: skip
ZEROS = {"method": "wanda", "pattern": "2:4"}


def mixture(kind: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**_SIZES, **KINDS[kind]})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture
def stored(tmp_path, tokenizer):
    """``stored(kind)``: a folder with a mixture as transformers writes it."""

    def make(kind: str):
        folder = tmp_path / kind
        mixture(kind).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


def expert_matrices(model) -> list[torch.Tensor]:
    """The weights of all experts, [out, in] each."""
    unfuse_all(model)
    return [linear.weight for _, experts in unfused_in(model) for linear in experts.modules()
            if isinstance(linear, nn.Linear)]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_taken_apart_and_put_together_they_are_the_same(kind, tokens, helpers):
    model = mixture(kind)
    before, weights = helpers.logits(model, tokens), dict(model.state_dict())
    unfuse_all(model)
    assert any(isinstance(m, UnfusedExperts) for m in model.modules())
    assert helpers.difference(helpers.logits(model, tokens), before) < 1e-6
    fuse_all(model)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_in_experts_load_in_the_stock_class(kind, tokens, helpers):
    model = compress.apply(mixture(kind), [ZEROS], tokens)
    assert type(model).__name__ == f"{kind}ForCausalLM"
    for weight in expert_matrices(model):
        assert ((weight.reshape(-1, 4) == 0).sum(1) == 2).all()


@pytest.mark.parametrize(
    ("kind", "step", "own"),
    [
        ("Mixtral", ZEROS, False),
        ("Mixtral", {"method": "shortgpt", "remove": 1}, False),
        ("Mixtral", {"method": "svd", "ratio": 0.6, "include": ["*.experts.*"]}, True),
        ("GptOss", ZEROS, False),
        ("GptOss", {"method": "gptq", "bits": 4, "group_size": 16}, True),
    ],
    ids=["zeros", "depth", "low rank", "transposed zeros", "precision"],
)
def test_a_streamed_run_is_what_the_live_model_becomes(
    kind, step, own, stored, text, tokens, helpers, tmp_path
):
    source = stored(kind)
    recipe = helpers.recipe(source, [step], text)
    result = compress.run(recipe, tmp_path / "run")
    fields = json.loads((result.model / "config.json").read_text())
    assert fields["model_type"].startswith("compress_") == own
    live, tokenizer = compress.load(source)
    from compress.data.calibration import calibration_batches
    from compress.data.calibration_spec import CalibrationSpec

    spec = CalibrationSpec.model_validate(recipe["calibration"])
    batches = calibration_batches(spec, tokenizer, live.config).batches
    compress.apply(live, [step], batches)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(result.model).eval()
    expected = helpers.logits(live, tokens)
    assert helpers.difference(helpers.logits(loaded, tokens), expected) < 1e-4
    compress.save(live, tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert helpers.difference(helpers.logits(again, tokens), expected) < 1e-4
    if own:
        stock = getattr(transformers, f"{kind}ForCausalLM")
        with pytest.raises((RuntimeError, ValueError)):
            stock.from_pretrained(result.model)


def test_each_expert_is_solved_with_its_own_tokens(tokens, helpers):
    """Least squares on what was routed to an expert beats the same on all tokens pooled."""
    step = {"method": "sparsegpt", "pattern": "2:4", "include": ["*.experts.*"]}
    model = mixture("Mixtral")
    seen: dict[str, list[torch.Tensor]] = {}
    unfuse_all(model)
    for path, experts in unfused_in(model):
        for name, linear in experts.named_modules():
            if isinstance(linear, nn.Linear):
                linear.register_forward_pre_hook(
                    lambda _m, args, name=f"{path}.{name}": seen.setdefault(name, []).append(
                        args[0]
                    )
                )
    helpers.logits(model, tokens)
    dense = {name: model.get_submodule(name).weight.clone() for name in seen}
    first = next(name for name in seen if ".layers.0." in name and name.endswith("gate_up_proj"))
    inputs = torch.cat(seen[first])
    pruned = compress.apply(mixture("Mixtral"), [step], tokens)
    unfuse_all(pruned)
    own = inputs @ (pruned.get_submodule(first).weight - dense[first]).t()
    magnitude = compress.apply(mixture("Mixtral"), [{**step, "method": "magnitude"}])
    unfuse_all(magnitude)
    other = inputs @ (magnitude.get_submodule(first).weight - dense[first]).t()
    assert float(own.square().sum()) < 0.7 * float(other.square().sum())


def test_experts_without_tokens_are_told_of_and_still_pruned(stored, text, helpers, tmp_path):
    source = stored("Mixtral")
    weights = load_file(source / "model.safetensors")
    for name, value in weights.items():
        if name.endswith("gate.weight"):  # the router: two experts of four, whatever comes
            value[:2], value[2:] = value[:1] * 1e-3, 0.0
            value[2:] = -value[:1].abs() * 1e3
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    recipe = helpers.recipe(source, [ZEROS], text, evaluation=helpers.evaluation(text))
    result = compress.run(recipe, tmp_path / "run")
    told = " ".join(result.report.steps[0].notes)
    assert "of experts" in told and "fewer tokens" in told
    model, _ = compress.load(result.model)
    assert all(((w.reshape(-1, 4) == 0).sum(1) == 2).all() for w in expert_matrices(model))


def test_sizes_are_told_as_active_and_total(stored):
    source = stored("Mixtral")
    found = compress.inspect(source)
    experts = 2 * 4 * (2 * 64 * 32 + 32 * 64)
    assert found["parameters"] - found["active_parameters"] == experts // 2
    streamed = StreamedModel(build_meta(transformers.AutoConfig.from_pretrained(source)))
    from compress.models.outline import outline_of

    outline = outline_of(streamed.model, streamed.anatomy, 32)
    assert outline.active_parameters == found["active_parameters"]
    attention = 2 * (2 * 32 * 32 + 2 * 16 * 32)
    assert outline.macs_per_token == experts // 2 + attention + 264 * 32


def test_shapes_of_another_model_are_refused(stored):
    source = stored("Mixtral")
    fields = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**fields, "intermediate_size": 48}))
    with pytest.raises(CompressError, match="as config.json promises"):
        compress.plan({"model": str(source), "steps": ["magnitude"]})
