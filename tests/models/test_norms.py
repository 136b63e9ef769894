"""A site knows the norm in front of it: what a forward with values shows to be so."""

from __future__ import annotations

import pytest
import torch

import compress
from compress.conformance.models import TINY
from compress.models.anatomy import anatomy_of
from compress.models.stream import build_meta


def inputs_and_outputs(model, block, ids) -> tuple[dict[str, list], dict[str, list]]:
    """What enters the linears of a block and what its norms return, by path, a list of calls."""
    entered: dict[str, list] = {}
    returned: dict[str, list] = {}
    hooks = []
    for name, module in model.get_submodule(block.path).named_modules():
        if name in block.linears:

            def enter(_module, args, name=name):
                entered.setdefault(name, []).append(args[0].flatten(0, -2).clone())

            hooks.append(module.register_forward_pre_hook(enter))
        elif "norm" in type(module).__name__.lower():

            def leave(_module, _args, output, name=name):
                returned.setdefault(name, []).append(output.flatten(0, -2).clone())

            hooks.append(module.register_forward_hook(leave))
    with torch.no_grad():
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return entered, returned


def same(entered: list, returned: list) -> bool:
    return len(entered) == len(returned) and all(map(torch.equal, entered, returned))


@pytest.mark.parametrize("family", TINY)
def test_a_site_reads_the_norm_it_names_and_no_other(family, tiny, tokens):
    model = tiny(family)
    for block in anatomy_of(model).blocks:
        entered, returned = inputs_and_outputs(model, block, tokens)
        for site in block.sites:
            read = [
                norm
                for norm, outputs in returned.items()
                if all(same(entered[name], outputs) for name in site.linears)
            ]
            assert site.norm == (read[0] if read else None), f"{block.path} {site.kind}: {read}"


@pytest.mark.parametrize(
    ("family", "fields", "norms"),
    [
        ("llama", {}, ("input_layernorm", "post_attention_layernorm")),
        ("gemma2", {}, ("input_layernorm", "pre_feedforward_layernorm")),
        ("gpt2", {}, ("ln_1", "ln_2")),
        ("gpt_neox", {}, ("input_layernorm", "post_attention_layernorm")),  # beside each other
        ("opt", {}, ("self_attn_layer_norm", "final_layer_norm")),
        ("opt", {"do_layer_norm_before": False}, (None, "self_attn_layer_norm")),
        ("bert", {}, (None, "attention.output.LayerNorm")),
        ("albert", {}, (None, "attention.LayerNorm")),
    ],
)  # fmt: skip
def test_norms_before_and_after(family, fields, norms, tiny):
    block = anatomy_of(tiny(family, **fields)).blocks[-1]
    found = {site.kind: site.norm for site in block.sites}
    assert (found["qkv"], found["up"]) == norms
    assert found["attention_out"] is None and found["down"] is None


@pytest.mark.parametrize("kind", ["CohereForCausalLM", "PhiForCausalLM"])
def test_parallel_branches_share_a_norm(kind):
    import transformers

    config = getattr(transformers, kind.replace("ForCausalLM", "Config"))(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, architectures=[kind],
    )  # fmt: skip
    for block in anatomy_of(build_meta(config)).blocks:
        assert {s.norm for s in block.sites if s.kind in ("qkv", "up")} == {"input_layernorm"}


@pytest.mark.parametrize(
    "step",
    [
        {"method": "svd", "ratio": 0.5},
        {"method": "ffn_width", "share": 0.25, "allocation": "per_layer"},
        {"method": "rtn", "bits": 4, "group_size": 16},
        {"method": "shortgpt", "remove": 1},
    ],
    ids=lambda step: step["method"],
)
def test_compressed_models_know_theirs(step, tiny, tokens):
    model = compress.apply(tiny("llama"), [step], tokens)
    for block in anatomy_of(model).blocks:
        assert block.site("qkv").norm == "input_layernorm"
        assert block.site("up").norm == "post_attention_layernorm"


def test_nothing_is_said_where_blocks_have_gone_unseen_by_the_config(tiny):
    model = tiny("modernbert")
    del model.model.layers[0]
    assert {site.norm for block in anatomy_of(model).blocks for site in block.sites} == {None}
