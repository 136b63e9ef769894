"""W8A8 on mixtures: smoothing leaves routers alone, and tokens do not depend on their batch."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    Cohere2MoeConfig,
    Cohere2MoeForCausalLM,
)

import compress
from compress.linear.int8 import Int8Linear
from compress.methods.quantize.smoothing import foldable
from compress.models.anatomy import QKV, UP, anatomy_of
from compress.models.experts import unfuse_all


@pytest.fixture
def glm(dense_then_experts):
    return dense_then_experts(2)


def test_smoothing_does_not_scale_what_a_router_reads(glm, tokens):
    tokens = tokens % 128
    norm = glm.model.layers[1].post_attention_layernorm.weight
    before, plain = norm.detach().clone(), copy.deepcopy(glm)
    with torch.no_grad():
        expected = glm(input_ids=tokens).logits
    smooth = compress.apply(glm, [{"method": "w8a8", "smoothing": 0.5}], tokens)
    compress.apply(plain, ["w8a8"])
    assert torch.equal(smooth.model.layers[1].post_attention_layernorm.weight, before)
    with torch.no_grad():
        errors = [(m(input_ids=tokens).logits - expected).norm() for m in (plain, smooth)]
    assert errors[1] < 1.5 * errors[0]


@pytest.mark.parametrize("apart", (False, True))
def test_what_is_folded_in_a_mixture(apart, glm):
    if apart:
        unfuse_all(glm)
    dense, mixture = anatomy_of(glm).blocks
    assert foldable(dense, dense.site(UP)) and foldable(mixture, mixture.site(QKV))
    assert not foldable(mixture, mixture.site(UP))


@pytest.mark.parametrize("shared", (0, 1))
def test_the_one_norm_of_a_block_is_not_folded(shared):
    """Attention and experts in parallel: the router reads what queries read."""
    config = Cohere2MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4,
        num_experts_per_tok=2, num_shared_experts=shared, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    (block,) = anatomy_of(Cohere2MoeForCausalLM(config)).blocks
    assert block.experts == 4
    assert not any(foldable(block, site) for site in block.sites)


@pytest.mark.parametrize("packed", (None, False, True))
def test_a_sequence_alone_is_what_it_is_in_a_batch(packed, tiny, tokens, tmp_path):
    """Live, and loaded in both ways."""
    model = compress.apply(tiny("mixtral"), ["w8a8"])
    if packed is not None:
        compress.save(model, tmp_path / "made")
        model, _ = compress.load(tmp_path / "made", packed=packed)
        assert packed == any(isinstance(m, Int8Linear) for m in model.modules())
    with torch.no_grad():
        alone, together = (model(input_ids=x).logits[0] for x in (tokens[:1], tokens[:2]))
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)
