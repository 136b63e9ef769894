"""Which block goes next: the one whose absence the last states miss least."""

from __future__ import annotations

import copy

import pytest
import torch

import compress
from compress.engine.context import StepContext
from compress.engine.steps import run_step
from compress.errors import CompressError
from compress.linear.matrix import matrix
from compress.methods.depth.fuse.choosing import fusible, losable, window
from compress.methods.depth.fuse.method import Fuse
from compress.models.anatomy import ATTENTION_OUT, DOWN, anatomy_of, find_blocks
from compress.models.groups import set_blocks
from compress.models.outline import outline_of
from compress.models.stream import StreamedModel

FAMILIES = ("llama", "gpt2", "bert")
LEARN = {"steps": 30, "batch": 2, "learning_rate": 0.01, "clip": None, "precision": "float32"}
OPTIONS = {"rank": 4, "delta_rate": 0.003}


def without(model, *gone):
    """A copy with the other blocks only."""
    shorter, path = copy.deepcopy(model), anatomy_of(model).blocks_path
    set_blocks(shorter, path, [b for i, b in enumerate(find_blocks(shorter)[1]) if i not in gone])
    return shorter


@pytest.fixture
def influence(tmp_path):
    """``influence(model, batches, **options)``: what a round would find."""

    class Asked(Fuse):
        def passes(self):
            (rounds,) = super().passes()
            return rounds.passes[:1]

    def run(model, batches, **options):
        found = run_step(
            Asked(remove=1, **options), StepContext(StreamedModel(model), batches, tmp_path)
        )
        assert list(tmp_path.iterdir()) == []
        return found["influence"]

    return run


def last_states(model, ids):
    found = []
    hook = find_blocks(model)[1][-1].register_forward_hook(
        lambda _m, _a, out: found.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model(input_ids=ids)
    hook.remove()
    return found[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_influence_is_what_the_last_states_miss(family, tiny, tokens, influence):
    model = tiny(family)
    batches = [{"input_ids": part} for part in tokens.split(3)]
    found = influence(model, batches, protect_first=1)
    assert found[0] is None
    whole = last_states(model, tokens)
    for index in (1, 2):
        states = last_states(without(model, index), tokens)
        cosine = torch.cosine_similarity(whole, states, dim=-1)
        assert found[index] == pytest.approx(1 - float(cosine.mean()), abs=1e-5)
    few = influence(model, batches, influence_batches=1)
    assert few[1:] == pytest.approx(influence(model, batches[:1])[1:], abs=1e-6)
    assert few[1:] != pytest.approx(found[1:], abs=1e-6)


def test_padding_has_no_influence(tiny, tokens, influence):
    model = tiny("llama")
    mask = torch.ones_like(tokens)
    mask[:, 16:] = 0
    padded = influence(model, [{"input_ids": tokens, "attention_mask": mask}])
    assert padded == pytest.approx(influence(model, [{"input_ids": tokens[:, :16]}]), abs=1e-5)


def test_a_block_that_adds_nothing_goes_first_and_is_missed_by_nobody(
    tiny, tokens, influence, helpers
):
    model = tiny("llama", num_hidden_layers=4)
    for kind in (ATTENTION_OUT, DOWN):
        block = anatomy_of(model).blocks[2]
        matrix(model.get_submodule(f"{block.path}.{block.site(kind).linears[0]}")).zero_()
    before = helpers.logits(model, tokens)
    found = influence(model, [{"input_ids": tokens}])
    assert min(found) == found[2] == pytest.approx(0, abs=1e-6)
    step = Fuse(remove=1, **OPTIONS, training=LEARN)
    compress.apply(model, [step], tokens, compute="float32")
    assert len(find_blocks(model)[1]) == 3
    assert helpers.difference(helpers.logits(model, tokens), before) < 1e-4


def test_influence_is_measured_anew_after_each_fusion(tiny, tokens, influence):
    once, twice = (tiny("llama", num_hidden_layers=5) for _ in range(2))
    options = {"group": 2, **OPTIONS, "training": LEARN}
    seen = []

    class Watched(Fuse):
        def decide(self, notes, anatomy):
            seen.append(super().decide(notes, anatomy))
            return seen[-1]

    compress.apply(once, [Fuse(remove=1, **options)], tokens, compute="float32")
    compress.apply(twice, [Watched(remove=2, **options)], tokens, compute="float32")
    expected = influence(once, [{"input_ids": tokens}])
    first, second = (decision["influence"] for decision in seen)
    assert second == pytest.approx(expected, abs=1e-5)
    stale = [value for i, value in enumerate(first) if i != seen[0]["removed"]]
    assert second != pytest.approx(stale, abs=1e-3)


def test_the_group_is_around_the_block(tiny):
    def found(count, removed, neighbours, **fields):
        blocks = anatomy_of(tiny("llama", num_hidden_layers=count, **fields)).blocks
        return window(blocks, removed, neighbours)

    assert found(12, 6, 7) == (2, 10)  # the released code: three before the one in front of it
    assert found(12, 0, 7) == (0, 8)
    assert found(12, 11, 7) == (4, 12)
    assert found(12, 5, 1) == (4, 6)
    assert found(12, 0, 1) == (0, 2)
    assert found(12, 5, 2) == (4, 7)
    assert found(4, 2, 7) == (0, 4)


def test_layers_of_different_types_stay_apart(tiny, tokens):
    model = tiny("modernbert", num_hidden_layers=7, global_attn_every_n_layers=3)
    types = model.config.layer_types
    anatomy = anatomy_of(model)
    assert types[1] == types[2] != types[3] != types[4] == types[5] != types[6]
    assert fusible(anatomy.blocks, range(7)) == losable(anatomy.blocks, range(7)) == [2, 5]
    assert window(anatomy.blocks, 5, 7) == (4, 6)
    with pytest.raises(CompressError, match="at most 2 blocks .* layer type"):
        Fuse(remove=3).check(anatomy, outline_of(model, anatomy, 16))
    step = Fuse(remove=2, **OPTIONS, training={**LEARN, "steps": 1})
    compress.apply(model, [step], tokens, compute="float32")
    assert model.config.layer_types == [types[i] for i in (0, 1, 3, 4, 6)]


def test_what_may_go(tiny):
    blocks = anatomy_of(tiny("llama", num_hidden_layers=5)).blocks
    assert fusible(blocks, range(5)) == [0, 1, 2, 3, 4]
    assert losable(blocks, range(5)) == [1, 2, 3, 4]
    assert fusible(blocks, [2, 3]) == losable(blocks, [2, 3]) == [2, 3]
