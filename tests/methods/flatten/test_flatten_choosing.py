"""Neighbours that are alike become one, by what their inputs have in common."""

from __future__ import annotations

import pytest
import torch

from compress.engine.context import StepContext
from compress.engine.steps import run_step
from compress.errors import CompressError
from compress.linear.matrix import matrix
from compress.methods.depth.flatten.choosing import choose_groups, removable
from compress.methods.depth.flatten.method import Flatten
from compress.models.anatomy import ATTENTION_OUT, DOWN, anatomy_of
from compress.models.outline import outline_of
from compress.models.stream import StreamedModel

PAIR = [[0], [1, 2]]


def measured(model, tokens, tmp_path, batch=4):
    """The similarity matrix that the method sees."""
    batches = [{"input_ids": part} for part in tokens.split(batch)]
    context = StepContext(StreamedModel(model), batches, tmp_path)
    return run_step(Flatten(remove=0), context)["similarity"]


def test_similarity_is_the_mean_cosine_of_inputs(make, tokens, tmp_path):
    model = make("llama")
    with torch.no_grad():
        states = model(input_ids=tokens, output_hidden_states=True).hidden_states[:3]
    rows = measured(model, tokens, tmp_path, batch=3)
    for i, row in enumerate(rows):
        expected = [float(torch.cosine_similarity(states[i], s, dim=-1).mean()) for s in states]
        assert row == pytest.approx(expected[: i + 1], abs=1e-5)


def test_padding_counts_for_nothing(make, tokens, tmp_path):
    model = make("llama")
    mask = torch.ones_like(tokens)
    mask[:, 16:] = 0
    context = StepContext(
        StreamedModel(model), [{"input_ids": tokens, "attention_mask": mask}], tmp_path
    )
    padded = run_step(Flatten(remove=0), context)["similarity"]
    short = measured(make("llama"), tokens[:, :16], tmp_path)
    assert padded[2] == pytest.approx(short[2], abs=1e-5)


def test_the_more_alike_the_less_is_lost(make, flatten, tokens, helpers, tmp_path):
    similar, errors = [], []
    for factor in (1.0, 0.3, 0.1):
        model = make("llama")
        for block in anatomy_of(model).blocks[1:]:
            for kind in (ATTENTION_OUT, DOWN):
                linear = model.get_submodule(f"{block.path}.{block.site(kind).linears[0]}")
                matrix(linear).mul_(factor)
        before = helpers.logits(model, tokens)
        similar.append(measured(model, tokens, tmp_path)[2][1])
        flatten(model, PAIR, restore_width=False, refit=False)
        errors.append(helpers.difference(helpers.logits(model, tokens), before))
    assert similar == sorted(similar) and errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 * errors[0]


def lower(matrix):
    return [row[: i + 1] for i, row in enumerate(matrix)]


def test_groups_compare_their_first_and_last_block():
    # 1 and 2 are most alike, then 2 and 3; but a group of all three would span 0.5.
    similarity = lower([
        [1.0, 0, 0, 0], [0.8, 1.0, 0, 0], [0.7, 0.99, 1.0, 0], [0.6, 0.5, 0.9, 1.0],
    ])  # fmt: skip
    run = [[0, 1, 2, 3]]
    assert choose_groups(similarity, run, 1, 4) == [[0], [1, 2], [3]]
    assert choose_groups(similarity, run, 2, 4) == [[0, 1, 2], [3]]
    # In pairs two blocks can only go if the best pair does not.
    assert choose_groups(similarity, run, 2, 2) == [[0, 1], [2, 3]]
    assert choose_groups(similarity, run, 0, 2) == [[0], [1], [2], [3]]
    assert choose_groups(similarity, [[0, 1], [2, 3]], 1, 4) == [[0], [1], [2, 3]]
    with pytest.raises(CompressError, match="neighbour"):
        choose_groups(similarity, run, 3, 2)


def test_what_can_still_be_lost():
    assert removable([[0], [1], [2], [3], [4]], [[0, 1, 2, 3, 4]], 2) == 2
    assert removable([[0], [1, 2], [3]], [[0, 1, 2, 3]], 2) == 0
    assert removable([[0], [1, 2], [3]], [[0, 1, 2, 3]], 3) == 1
    assert removable([[0], [1], [2]], [[0], [2]], 3) == 0


def test_layers_of_different_types_stay_apart(make, flatten):
    model = make("modernbert", num_hidden_layers=6, global_attn_every_n_layers=3)
    types = model.config.layer_types
    assert types[1] == types[2] != types[3] != types[4] == types[5]
    flatten(model, remove=2)
    assert model.config.layer_types == [types[i] for i in (0, 1, 3, 4)]
    outline = outline_of(model, anatomy_of(model), 16)
    with pytest.raises(CompressError, match="at most 0 blocks"):
        Flatten(remove=1).check(anatomy_of(model), outline)


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"remove": 2, "group": 2}, "at most 1 blocks"),
        ({"remove": 2, "protect_last": 1}, "at most 1 blocks"),
        ({"remove": 3}, "so that one is left"),
    ),
)
def test_more_than_can_go_is_refused(options, message, make):
    anatomy = anatomy_of(model := make("llama"))
    with pytest.raises(CompressError, match=message):
        Flatten(**options).check(anatomy, outline_of(model, anatomy, 16))
