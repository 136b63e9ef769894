"""Layers that are run again in the backward pass: the same gradients, and nothing stays behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from compress.errors import CompressError
from compress.train.recompute import recomputing

FAMILIES = ("llama", "gpt2", "bert", "opt")


def layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def learned(model: nn.Module, tokens: torch.Tensor, recomputed: bool, **inputs):
    """Loss, gradients, and how often a layer's first linear ran."""
    model.zero_grad()
    inner = next(m for m in layers(model)[0].modules() if not list(m.children()))
    runs: list[None] = []
    hook = inner.register_forward_hook(lambda *_: runs.append(None))
    torch.manual_seed(5)
    with recomputing(model, recomputed):
        loss = model(input_ids=tokens, labels=tokens, **inputs).loss
        loss.backward()
    hook.remove()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), found, len(runs)


def check_the_same(model: nn.Module, tokens: torch.Tensor, **inputs) -> None:
    value, plain, once = learned(model, tokens, False, **inputs)
    again, recomputed, twice = learned(model, tokens, True, **inputs)
    assert (once, twice) == (1, 2)
    assert torch.equal(again, value)
    assert plain and plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        assert torch.equal(recomputed[name], gradient), name


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_same(family, tiny, tokens):
    dropout = {"dropout": 0.1, "layerdrop": 0.5} if family == "opt" else {}
    check_the_same(tiny(family, **dropout), tokens)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_dropout_is_the_same_again(family, tiny, tokens):
    check_the_same(tiny(family).train(), tokens)


def test_inputs_of_layers_need_no_gradients(tiny, tokens):
    model = tiny("llama")
    model.get_input_embeddings().requires_grad_(False)
    check_the_same(model, tokens)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mamba"])
def test_caches_are_not_written_twice(family, tiny, tokens):
    check_the_same(tiny(family), tokens, use_cache=True)


def test_rwkv_has_no_state(tokens):
    from transformers import RwkvConfig, RwkvForCausalLM

    config = RwkvConfig(
        vocab_size=264, hidden_size=16, num_hidden_layers=2, rescale_every=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    model = RwkvForCausalLM(config).eval()
    wanted = learned(model, tokens, False, use_cache=False)[1]
    found = learned(model, tokens, True)[1]
    assert all(torch.equal(found[n], g) for n, g in wanted.items())


def test_a_cache_stays_where_there_are_no_gradients(tiny, tokens):
    model = tiny("gpt2")
    with recomputing(model, True), torch.no_grad():
        start = model(input_ids=tokens[:, :8], use_cache=True)
        end = model(input_ids=tokens[:, 8:], past_key_values=start.past_key_values)
        whole = model(input_ids=tokens)
    assert torch.allclose(end.logits, whole.logits[:, 8:], atol=1e-5)


def test_layers_of_a_models_own_code_recompute(tiny, tokens, monkeypatch):
    model = tiny("llama")
    monkeypatch.setattr("compress.train.recompute.GradientCheckpointingLayer", nn.Bilinear)
    check_the_same(model, tokens)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_stays_behind(fails, family, tiny, tokens):
    model = tiny(family)
    wrapped = layers(model)[1]
    wrapped.forward = own = wrapped.forward  # as accelerate replaces it

    def state() -> list:
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
        return [
            (m.training, vars(m).get("forward"), getattr(m, "gradient_checkpointing", None),
             *(len(getattr(m, name)) for name in hooks))
            for m in model.modules()
        ]  # fmt: skip

    def train() -> None:
        with recomputing(model, True):
            assert not any(m.training for m in model.modules())
            model(input_ids=tokens, labels=tokens).loss.backward()
            if fails:
                raise KeyboardInterrupt

    before = state()
    if fails:
        with pytest.raises(KeyboardInterrupt):
            train()
    else:
        train()
    assert state() == before
    assert vars(wrapped)["forward"] is own


@pytest.mark.parametrize("family", ["albert", None])
def test_what_cannot_recompute_is_refused(family, tiny):
    module = tiny(family) if family else nn.Linear(2, 2)
    with (
        pytest.raises(CompressError, match="supports gradient checkpointing"),
        recomputing(module, True),
    ):
        raise AssertionError
