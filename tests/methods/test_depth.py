"""Which blocks go: those that do nothing before all others."""

from __future__ import annotations

import copy

import pytest
import torch

import compress
from compress.engine.context import StepContext
from compress.engine.steps import run_step
from compress.errors import CompressError
from compress.linear.matrix import matrix
from compress.methods.depth import loss
from compress.methods.depth.drop import DropBlocks
from compress.methods.depth.shortgpt import ShortGPT
from compress.methods.depth.sleb import SLEB
from compress.models.anatomy import ATTENTION_OUT, DOWN, anatomy_of, find_blocks
from compress.models.outline import outline_of
from compress.models.stream import StreamedModel

IDLE = 1  # the block that does nothing


@torch.no_grad()
def make_idle(model, index):
    """Make a pre-norm block the identity: nothing is added to the residual stream."""
    block = anatomy_of(model).blocks[index]
    for kind in (ATTENTION_OUT, DOWN):
        linear = model.get_submodule(f"{block.path}.{block.site(kind).linears[0]}")
        matrix(linear).zero_()
        if linear.bias is not None:
            linear.bias.zero_()


@torch.no_grad()
def own_words(model, tokens, masked):
    """Labels that the model itself finds most likely, so that every change of it costs."""
    labels = model(input_ids=tokens).logits.argmax(-1)
    return labels if masked else torch.cat([tokens[:, :1], labels[:, :-1]], dim=1)


@pytest.fixture
def decide(tokens, tmp_path):
    def run(model, method, labels=None):
        batches = [{"input_ids": part} for part in tokens.split(4)]
        parts = None if labels is None else list(labels.split(4))
        return run_step(method, StepContext(StreamedModel(model), batches, tmp_path, labels=parts))

    return run


@pytest.mark.parametrize("family", ("llama", "qwen3", "gpt2", "opt", "gpt_neox", "modernbert"))
def test_an_idle_block_has_no_influence(family, tiny, decide):
    model = tiny(family)
    make_idle(model, IDLE)
    decision = decide(model, ShortGPT(remove=1))
    assert decision["removed"] == [IDLE]
    assert abs(decision["influence"][IDLE]) < 1e-6
    assert min(decision["influence"][0], decision["influence"][2]) > 1e-4


@pytest.mark.parametrize("family", ("llama", "gemma2", "gpt2", "opt", "modernbert"))
def test_an_idle_block_is_missed_least(family, tiny, tokens, decide):
    model = tiny(family)
    make_idle(model, IDLE)
    labels = own_words(model, tokens, masked=family == "modernbert")
    decision = decide(model, SLEB(remove=2), labels)
    assert decision["order"][0] == IDLE
    assert decision["removed"] == sorted(decision["order"])
    assert len(set(decision["order"])) == 2


@pytest.mark.parametrize("family", ("llama", "gemma2", "gpt2", "bert", "modernbert"))
def test_loss_is_that_of_the_shorter_model(family, tiny, tokens, decide, monkeypatch):
    model = tiny(family)
    labels = own_words(model, tokens, masked="bert" in family)
    labels[0, :5] = -100
    expected = {}
    for gone in SLEB(remove=1).candidates(3, anatomy_of(model).family):
        shorter = copy.deepcopy(model)
        _, blocks = find_blocks(shorter)
        blocks[gone].forward = lambda hidden, *_args, **_kwargs: hidden
        with torch.no_grad():
            expected[gone] = float(shorter(input_ids=tokens, labels=labels).loss)
    # Pieces of five positions; the whole would be 8 x 24.
    monkeypatch.setattr(loss, "_LOGIT_BYTES", 5 * 4 * 4 * model.config.vocab_size)
    decision = decide(model, SLEB(remove=1), labels)
    assert decision["losses"][0] == pytest.approx(min(expected.values()), rel=1e-4)
    assert decision["order"][0] == min(expected, key=expected.get)


@pytest.mark.parametrize("method", (ShortGPT, SLEB))
def test_a_block_that_no_other_can_follow_stays(method, tiny, decide):
    model = tiny("modernbert")
    make_idle(model, 0)
    assert decide(model, method(remove=2))["removed"] == [1, 2]


def test_masked_model_without_labels(tiny, decide):
    first = decide(tiny("bert"), SLEB(remove=1))
    assert first == decide(tiny("bert"), SLEB(remove=1))
    assert first["losses"] != decide(tiny("bert"), SLEB(remove=1, seed=1))["losses"]


@pytest.mark.parametrize("method", (ShortGPT, SLEB))
def test_protected_blocks_stay(method, tiny, decide):
    model = tiny("llama")
    make_idle(model, 0)
    decision = decide(model, method(remove=1, protect_first=1, protect_last=1))
    assert decision["removed"] == [1]
    assert method(remove=1).kept_blocks(decision, anatomy_of(model)) == [0, 2]


@pytest.mark.parametrize("method", (ShortGPT, SLEB))
def test_no_share_removes_nothing(method, tiny, decide):
    model = tiny("llama")
    decision = decide(model, method(share=0))
    assert method(share=0).kept_blocks(decision, anatomy_of(model)) == [0, 1, 2]


@pytest.mark.parametrize("method", (ShortGPT, SLEB))
@pytest.mark.parametrize(
    ("family", "options", "message"),
    (
        ("albert", {"remove": 1}, "layers share one set"),
        ("llama", {"remove": 3}, "so that one is left"),
        ("llama", {"remove": 2, "protect_first": 1, "protect_last": 1}, "2 of them protected"),
        ("llama", {"share": 0.1}, "at least one of 3 blocks"),
    ),
)
def test_refused_before_any_work(method, family, options, message, tiny):
    model = tiny(family)
    anatomy = anatomy_of(model)
    with pytest.raises(CompressError, match=message):
        method(**options).check(anatomy, outline_of(model, anatomy, 16))


def test_sleb_wants_a_language_model(tiny):
    model = tiny("bert").bert
    anatomy = anatomy_of(model)
    with pytest.raises(CompressError, match="Use shortgpt"):
        SLEB(remove=1).check(anatomy, outline_of(model, anatomy, 16))


@pytest.mark.parametrize("method", (ShortGPT, SLEB))
def test_plan_predicts_the_size(method, tiny):
    model = tiny("gpt2")
    anatomy = anatomy_of(model)
    predicted = method(share=0.34).predict(outline_of(model, anatomy, 16))
    shorter = tiny("gpt2", n_layer=2)
    found = outline_of(shorter, anatomy_of(shorter), 16)
    assert predicted.parameters == found.parameters
    assert [b.anatomy.path for b in predicted.blocks] == [b.anatomy.path for b in found.blocks]


def test_named_blocks_go(tiny, tokens):
    model, whole = tiny("llama"), tiny("llama")
    compress.apply(model, [{"method": "drop_blocks", "blocks": [0, 2]}])
    (left,) = model.model.layers
    whole.model.layers = whole.model.layers[1:2]
    whole.model.layers[0].self_attn.layer_idx = 0
    assert left.state_dict().keys() == whole.model.layers[0].state_dict().keys()
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, whole(tokens, use_cache=False).logits)


@pytest.mark.parametrize(
    ("family", "blocks", "message"),
    (
        ("llama", [1, 7], "blocks from 0 to 2, got 7"),
        ("llama", [0, 1, 2], "at least one block that stays"),
        ("albert", [0], "layers share one set"),
    ),
)
def test_blocks_that_cannot_go(family, blocks, message, tiny):
    model = tiny(family)
    anatomy = anatomy_of(model)
    with pytest.raises(CompressError, match=message):
        DropBlocks(blocks=blocks).check(anatomy, outline_of(model, anatomy, 16))
