"""Experts that contribute least go from every layer, and with them what the router held of them."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

import compress
from compress.conformance.models import build
from compress.errors import CompressError

KEEP_TWO = {"method": "drop_experts", "keep": 2}


def expert_parts(model: torch.nn.Module) -> list[tuple[torch.nn.Module, torch.nn.Module]]:
    """Router and experts of each layer."""
    return [(layer.mlp.gate, layer.mlp.experts) for layer in model.model.layers]


@torch.no_grad()
def contributions(model: torch.nn.Module, tokens: torch.Tensor) -> list[tuple[list, list]]:
    """Tokens and summed routing weight x output norm of each expert, from the stock forward."""
    seen = []
    for _, experts in expert_parts(model):
        experts.register_forward_pre_hook(lambda module, args: seen.append((module, *args)))
    model(input_ids=tokens)
    found = []
    for module, states, index, weights in seen:
        counts, sums = [], []
        for number in range(module.num_experts):
            gate, up = (states @ module.gate_up_proj[number].t()).chunk(2, dim=-1)
            made = (module.act_fn(gate) * up) @ module.down_proj[number].t()
            routed = (index == number) * weights
            counts.append(int((index == number).sum()))
            sums.append(float((routed.sum(-1) * made.norm(dim=-1)).sum()))
        found.append((counts, sums))
    return found


@pytest.mark.parametrize("importance", ["mean", "sum", "tokens"])
def test_those_that_contribute_most_stay_and_the_router_keeps_their_rows(importance, tokens):
    dense = build("mixtral")
    scores = contributions(build("mixtral"), tokens)
    smaller = compress.apply(build("mixtral"), [{**KEEP_TWO, "importance": importance}], tokens)
    for (counts, sums), old, new in zip(
        scores, expert_parts(dense), expert_parts(smaller), strict=True
    ):
        score = {
            "mean": [s / max(1, c) for s, c in zip(sums, counts, strict=True)],
            "sum": sums,
            "tokens": counts,
        }[importance]
        kept = sorted(sorted(range(4), key=lambda i: -score[i])[:2])
        assert torch.equal(new[0].weight, old[0].weight[kept])
        assert torch.equal(new[1].gate_up_proj, old[1].gate_up_proj[kept])
        assert torch.equal(new[1].down_proj, old[1].down_proj[kept])
    # The balancing loss of the head counts experts by this.
    assert smaller.num_experts == smaller.config.num_local_experts == 2


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_that_no_token_is_sent_to_are_not_missed(kind, tokens, helpers):
    fields = {"num_local_experts" if kind == "mixtral" else "num_experts": 6}
    model = build(kind, **fields)
    with torch.no_grad():
        for router, _ in expert_parts(model):
            row = router.weight[:1].clone()  # whatever its sign, the last two never come first
            router.weight.copy_(row * torch.tensor([[1.0], [-1], [0.9], [-0.9], [0.5], [-0.5]]))
    before = helpers.logits(model, tokens)
    compress.apply(model, [{"method": "drop_experts", "keep": 4}], tokens)
    assert all(len(router.weight) == 4 for router, _ in expert_parts(model))
    assert helpers.difference(helpers.logits(model, tokens), before) < 1e-6


def test_a_run_writes_a_stock_checkpoint_of_the_planned_sizes(tokenizer, text, helpers, tmp_path):
    source = tmp_path / "source"
    # The first layer is dense, and stays.
    build("qwen2_moe", mlp_only_layers=[0]).save_pretrained(source)
    tokenizer.save_pretrained(source)
    steps = [{"method": "drop_experts", "share": 0.5}]
    recipe = helpers.recipe(source, steps, text)
    planned, dense = compress.plan(recipe).result, compress.inspect(source)
    result = compress.run(recipe, tmp_path / "run")
    fields = json.loads((result.model / "config.json").read_text())
    assert fields["model_type"] == "qwen2_moe" and fields["num_experts"] == 2
    assert not fields.keys() & {"compress", "compressed_modules", "per_layer_config"}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(result.model)
    original = transformers.AutoModelForCausalLM.from_pretrained(source)
    assert type(loaded) is transformers.Qwen2MoeForCausalLM
    for old, new in zip(original.model.layers[1:], loaded.model.layers[1:], strict=True):
        shared = old.mlp.shared_expert.state_dict()
        assert all(torch.equal(shared[n], t) for n, t in new.mlp.shared_expert.state_dict().items())
        assert torch.equal(old.mlp.shared_expert_gate.weight, new.mlp.shared_expert_gate.weight)
    after = compress.inspect(result.model)
    assert [block.get("experts", 0) for block in after["blocks"]] == [0, 2, 2]
    for size in ("parameters", "active_parameters", "macs_per_token"):
        assert after[size] == getattr(planned, size)
    gone = 2 * 2 * (2 * 32 * 32 + 32 * 32)  # in two layers two experts each
    assert dense["parameters"] - after["parameters"] == gone + 2 * 2 * 32  # and their router rows
    # A token is sent to two experts, as before.
    assert dense["active_parameters"] - after["active_parameters"] == 2 * 2 * 32
    assert dense["macs_per_token"] == after["macs_per_token"]


def test_it_takes_rounded_and_sparse_experts_as_they_are(tokens, helpers, tmp_path):
    steps = [
        {"method": "magnitude", "pattern": "2:4"}, {"method": "rtn", "bits": 8, "group_size": 16},
        KEEP_TWO,
    ]  # fmt: skip
    model = compress.apply(build("mixtral"), steps, tokens)
    expected = helpers.logits(model, tokens)
    compress.save(model, tmp_path / "saved")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.config.num_local_experts == 2
    assert helpers.difference(helpers.logits(loaded, tokens), expected) < 1e-4


@pytest.mark.parametrize(
    ("kind", "step", "told"),
    [
        ("llama", KEEP_TWO, "expected a mixture of experts"),
        ("mixtral", {"method": "drop_experts", "keep": 1}, "expected 2 to 4 experts"),
        ("mixtral", {"method": "drop_experts", "keep": 5}, "expected 2 to 4 experts"),
        ("mixtral", {"method": "drop_experts", "share": 0.1}, "removes at least one of 4"),
    ],
)
def test_what_cannot_be_is_refused(kind, step, told, tokens):
    with pytest.raises(CompressError, match=told):
        compress.apply(build(kind), [step], tokens)


def test_a_router_that_chooses_among_groups_first_is_refused(tokens):
    config = transformers.DeepseekV3Config(
        vocab_size=264, hidden_size=32, intermediate_size=64, moe_intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, n_routed_experts=8,
        num_experts_per_tok=2, n_group=2, topk_group=1, q_lora_rank=16, kv_lora_rank=8,
        qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, first_k_dense_replace=1,
    )  # fmt: skip
    model = transformers.DeepseekV3ForCausalLM(config)
    with pytest.raises(CompressError, match="among 2 groups"):
        compress.apply(model, [{"method": "drop_experts", "keep": 4}], tokens)
