"""Blocks side by side compute the sum of what they did; narrowed ones the best part of it."""

from __future__ import annotations

import copy

import pytest
import torch
from pydantic import ValidationError

from compress.conformance.tiny import TinyFamily
from compress.conformance.trial import Trial
from compress.linear.matrix import matrix
from compress.methods.depth.flatten.merging import flatten_blocks
from compress.methods.depth.flatten.method import Flatten
from compress.methods.work import GroupWork
from compress.models.anatomy import ATTENTION_OUT, DOWN, anatomy_of, find_blocks
from compress.models.groups import set_blocks
from compress.models.outline import outline_of

SEQUENTIAL = ("llama", "qwen2", "phi3", "gpt2", "opt", "gemma", "modernbert")
FAMILIES = (*SEQUENTIAL, "gpt_neox")
PAIR = [[0], [1, 2]]


def output(model, index, kind):
    block = anatomy_of(model).blocks[index]
    return model.get_submodule(f"{block.path}.{block.site(kind).linears[0]}")


@torch.no_grad()
def silence(linear):
    matrix(linear).zero_()
    if linear.bias is not None:
        linear.bias.zero_()


def side_by_side(model, group, parallel):
    """A copy in which the first block of a group computes the formula, and the others nothing.

    What a part of a block adds is what the block adds once its other part writes zeros.
    """
    parts = {}
    for kind, other in ((ATTENTION_OUT, DOWN), (DOWN, ATTENTION_OUT)):
        quiet = copy.deepcopy(model)
        for index in group:
            silence(output(quiet, index, other))
        parts[kind] = [find_blocks(quiet)[1][index] for index in group]

    def added(kind, hidden, *args, **kwargs):
        outputs = [block(hidden, *args, **kwargs) for block in parts[kind]]
        return sum((o[0] if isinstance(o, tuple) else o) - hidden for o in outputs)

    def forward(hidden, *args, **kwargs):
        first = hidden + added(ATTENTION_OUT, hidden, *args, **kwargs)
        return first + added(DOWN, hidden if parallel else first, *args, **kwargs)

    wide = copy.deepcopy(model)
    for index, block in enumerate(find_blocks(wide)[1]):
        if index == group[0]:
            block.forward = forward
        elif index in group:
            block.forward = lambda hidden, *_args, **_kwargs: hidden
    return wide


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gpt_neox"])
def test_without_restored_width_blocks_run_side_by_side(family, make, flatten, tokens, helpers):
    model = make(family)
    expected = helpers.logits(side_by_side(model, [1, 2], parallel=False), tokens)
    before = anatomy_of(model).blocks[0].widths
    flatten(model, PAIR, restore_width=False, refit=False)
    after = [block.widths for block in anatomy_of(model).blocks]
    assert after == [before, {k: 2 * v for k, v in before.items()}]
    assert helpers.difference(helpers.logits(model, tokens), expected) < 1e-5


def test_blocks_of_parallel_parts_run_side_by_side(make, tokens, helpers):
    """GPT-NeoX can hold another number of heads only in memory."""
    model = make("gpt_neox")
    expected = helpers.logits(side_by_side(model, [1, 2], parallel=True), tokens)
    anatomy = anatomy_of(model)
    work = GroupWork(
        find_blocks(model)[1][1:],
        list(anatomy.blocks[1:]),
        model.config,
        None,
        [],
        torch.device("cpu"),
    )
    with torch.no_grad():
        wide = flatten_blocks(work)
    set_blocks(model, anatomy.blocks_path, [find_blocks(model)[1][0], wide])
    assert helpers.difference(helpers.logits(model, tokens), expected) < 1e-5


def test_three_blocks_side_by_side(make, flatten, tokens, helpers):
    model = make("llama")
    expected = helpers.logits(side_by_side(model, [0, 1, 2], parallel=False), tokens)
    flatten(model, [[0, 1, 2]], restore_width=False, refit=False)
    assert helpers.difference(helpers.logits(model, tokens), expected) < 1e-5


@pytest.mark.parametrize("family", ("llama", "gpt2"))
def test_a_block_that_adds_nothing_is_taken_in_without_loss(family, make, flatten, tokens, helpers):
    model = make(family)
    for kind in (ATTENTION_OUT, DOWN):
        silence(output(model, 2, kind))
    before = helpers.logits(model, tokens)
    flatten(model, PAIR, restore_width=False, refit=False)
    assert helpers.difference(helpers.logits(model, tokens), before) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_result_has_the_shapes_of_a_shorter_model(family, make, flatten):
    model = make(family)
    flatten(model, PAIR)
    shorter = make(family, num_hidden_layers=2) if family != "gpt2" else make(family, n_layer=2)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in shorter.state_dict().items()}
    assert all(
        module.layer_idx == index
        for index, block in enumerate(find_blocks(model)[1])
        for module in block.modules()
        if hasattr(module, "layer_idx")
    )


@pytest.mark.parametrize("family", ("llama", "phi3", "gpt2"))
def test_units_go_as_wholes(family, make, flatten, tokens, helpers):
    """With hardly any correction the narrow block is the wide one with the same units zeroed."""
    narrow = make(family)
    wide = copy.deepcopy(narrow)
    flatten(narrow, PAIR, attention_correction=False, ridge=1e9, refit=False)
    flatten(wide, PAIR, restore_width=False, refit=False)
    block = anatomy_of(wide).blocks[1]
    for kind in (ATTENTION_OUT, DOWN):
        old, new = matrix(output(wide, 1, kind)), matrix(output(narrow, 1, kind))
        near = (old[:, :, None] - new[:, None, :]).abs().amax(0) < 1e-5
        stays = near.any(1)
        assert int(stays.sum()) == new.shape[1] == old.shape[1] // 2
        if kind == ATTENTION_OUT:
            groups = stays.reshape(block.kv_heads, -1)
            assert bool((groups.all(1) | ~groups.any(1)).all())
        old[:, ~stays] = 0
    assert helpers.difference(helpers.logits(narrow, tokens), helpers.logits(wide, tokens)) < 1e-4


@pytest.mark.parametrize("restored", (True, False))
@pytest.mark.parametrize("family", ("llama", "gpt2"))
def test_a_cache_changes_nothing(family, restored, make, flatten, tokens, helpers):
    model = make(family)
    flatten(model, PAIR, restore_width=restored)
    cached = helpers.cached_logits(model, tokens)
    assert helpers.difference(cached, helpers.logits(model, tokens)) < 1e-4


@pytest.mark.parametrize("options", ({}, {"remove": 1, "share": 0.5}, {"remove": 1, "ridge": 0}))
def test_options_that_say_nothing_are_refused(options):
    with pytest.raises(ValidationError):
        Flatten(**options)


@pytest.mark.parametrize("restored", (True, False))
@pytest.mark.parametrize("family", ("llama", "gpt2"))
def test_the_plan_is_exact(family, restored, make, flatten):
    model = make(family)
    anatomy = anatomy_of(model)
    method = Flatten(remove=1, restore_width=restored)
    predicted = method.predict(outline_of(model, anatomy, 16))
    flatten(model, remove=1, restore_width=restored)
    found = outline_of(model, anatomy_of(model), 16)
    assert predicted.parameters == found.parameters
    assert [b.anatomy.path for b in predicted.blocks] == [b.anatomy.path for b in found.blocks]


def test_without_restored_width_a_run_gives_what_apply_gives(tmp_path):
    trial = Trial(
        Flatten(remove=1, restore_width=False), TinyFamily("llama", tmp_path / "tiny"), tmp_path
    )
    trial.changes_what_it_declares()
    trial.streamed_equals_live()
    trial.saved_checkpoint_is_the_model()
    trial.predicts_sizes()


def test_a_16_bit_model_stays_one(make, flatten, tokens, helpers):
    model, narrow = make("llama"), make("llama").bfloat16()
    flatten(model, PAIR, refit=False)  # so few tokens are fitted as far as rounding lets them
    flatten(narrow, PAIR, refit=False)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    found = helpers.logits(narrow, tokens).float()
    assert helpers.difference(found, helpers.logits(model, tokens)) < 0.2
