"""Scales and shifts of norms go into the linears behind them, or the family is refused."""

from __future__ import annotations

import pytest
import torch
import transformers

from compress.errors import CompressError
from compress.methods.depth.flatten.folding import fold_norms, obstacle, take_affine
from compress.methods.depth.flatten.method import Flatten
from compress.models.anatomy import QKV, UP, anatomy_of, find_blocks
from compress.models.outline import outline_of

SEQUENTIAL = ("llama", "qwen2", "phi3", "gpt2", "opt", "gemma", "modernbert")
FAMILIES = (*SEQUENTIAL, "gpt_neox")
PAIR = [[0], [1, 2]]


@pytest.mark.parametrize("family", FAMILIES)
def test_folded_norms_change_nothing(family, make, tokens, helpers):
    model = make(family)
    before = helpers.logits(model, tokens)
    folded = 0
    for block in anatomy_of(model).blocks:
        if obstacle(block):
            assert family == "modernbert" and block.index == 0  # has no norm of its own
            continue
        with torch.no_grad():
            fold_norms(model.get_submodule(block.path), block)
        folded += 1
        for site in (block.site(QKV), block.site(UP)):
            norm = model.get_submodule(f"{block.path}.{site.norm}")
            assert len(set(norm.weight.tolist())) == 1
            assert getattr(norm, "bias", None) is None or not norm.bias.any()
    assert folded >= 2
    assert helpers.difference(helpers.logits(model, tokens), before) < 1e-5


@pytest.mark.parametrize(
    ("family", "message"),
    (
        ("qwen3", "q_norm"),
        ("gemma2", "post_attention_layernorm"),
        ("bert", "post-norm"),
        ("distilbert", "post-norm"),
        ("albert", "layers share one set"),
        ("mamba", "known build"),
    ),
)
def test_what_cannot_be_folded_is_refused(family, message, tiny):
    anatomy = anatomy_of(model := tiny(family))
    with pytest.raises(CompressError, match=message):
        Flatten(remove=1).check(anatomy, outline_of(model, anatomy, 16))


def test_a_shift_that_nothing_can_take_is_refused():
    config = transformers.GPTJConfig(
        vocab_size=264, n_embd=32, n_layer=3, n_head=4, rotary_dim=4, n_positions=64
    )
    anatomy = anatomy_of(model := transformers.GPTJForCausalLM(config))
    with pytest.raises(CompressError, match="without a bias"):
        Flatten(remove=1).check(anatomy, outline_of(model, anatomy, 16))


def test_a_norm_that_the_stream_passes_is_seen(make, flatten):
    """A block may add what its norm returns instead of what it reads: no shape tells."""
    model = make("llama")

    class Passing(type(find_blocks(model)[1][0])):
        def forward(self, hidden_states, *args, **kwargs):
            output = super().forward(hidden_states, *args, **kwargs)
            return output - hidden_states + self.input_layernorm(hidden_states)

    for block in find_blocks(model)[1]:
        block.__class__ = Passing
    with pytest.raises(CompressError, match="serve its linears alone"):
        flatten(model, PAIR)


def test_a_norm_of_another_form_is_left_as_it_was():
    class Squashed(torch.nn.LayerNorm):
        def forward(self, x):
            return super().forward(x).tanh()

    norm = Squashed(8)
    torch.nn.init.normal_(norm.weight)
    before = norm.weight.clone()
    with torch.no_grad(), pytest.raises(CompressError, match="scale \\* normalised"):
        take_affine(norm, 8, "block.norm")
    assert torch.equal(norm.weight, before)
