"""Blocks side by side compute the sum of what they did; narrowed ones the best part of it."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from pydantic import ValidationError

import compress
from compress.conformance.tiny import TinyFamily
from compress.conformance.trial import Trial
from compress.engine.context import StepContext
from compress.engine.steps import run_step
from compress.errors import CompressError
from compress.linear.algebra import relative_error
from compress.linear.matrix import matrix
from compress.linear.statistics import GRAM, InputStatistics
from compress.methods.depth.flatten.choosing import choose_groups, removable
from compress.methods.depth.flatten.folding import fold_norms, obstacle, take_affine
from compress.methods.depth.flatten.merging import flatten_blocks
from compress.methods.depth.flatten.method import Flatten
from compress.methods.depth.flatten.restoring import (
    corrected,
    head_scores,
    leverage_scores,
    ridge,
)
from compress.methods.work import GroupWork
from compress.models.anatomy import ATTENTION_OUT, DOWN, QKV, UP, anatomy_of, find_blocks
from compress.models.groups import set_blocks
from compress.models.outline import outline_of
from compress.models.stream import StreamedModel

SEQUENTIAL = ("llama", "qwen2", "phi3", "gpt2", "opt", "gemma", "modernbert")
FAMILIES = (*SEQUENTIAL, "gpt_neox")
ONE_TYPE = {"global_attn_every_n_layers": 1}  # ModernBERT with full attention everywhere
PAIR = [[0], [1, 2]]
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@pytest.fixture
def make(tiny):
    """``make(family)``: a tiny model whose last two blocks can become one."""

    def build(family, **fields):
        if family == "modernbert":
            fields = {**ONE_TYPE, **fields}
        if family != "gemma":
            model = tiny(family, **fields)
        else:
            config = transformers.GemmaConfig(
                **{"vocab_size": 264, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8,
                   "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
                   "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **fields}
            )  # fmt: skip
            torch.manual_seed(0)
            model = transformers.GemmaForCausalLM(config).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.config.use_cache = False
        return model

    return build


@pytest.fixture
def flatten(tokens, tmp_path):
    """``flatten(model, groups, **options)``: these blocks become one, in place; returns the notes.

    Without groups they are chosen; the decision is then returned.
    """

    def run(model, groups=None, **options):
        class Chosen(Flatten):
            def decide(self, similarity, anatomy):
                return {"groups": groups, "similarity": similarity}

        if groups is not None:
            options = {"remove": len(find_blocks(model)[1]) - len(groups), **options}
        compress.apply(
            model, [(Flatten if groups is None else Chosen)(**options)], tokens, compute="float32"
        )

    return run


def blocks_of(model):
    return [model.get_submodule(b.path) for b in anatomy_of(model).blocks]


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
        parts[kind] = [blocks_of(quiet)[index] for index in group]

    def added(kind, hidden, *args, **kwargs):
        outputs = [block(hidden, *args, **kwargs) for block in parts[kind]]
        return sum((o[0] if isinstance(o, tuple) else o) - hidden for o in outputs)

    def forward(hidden, *args, **kwargs):
        first = hidden + added(ATTENTION_OUT, hidden, *args, **kwargs)
        return first + added(DOWN, hidden if parallel else first, *args, **kwargs)

    wide = copy.deepcopy(model)
    for index, block in enumerate(blocks_of(wide)):
        if index == group[0]:
            block.forward = forward
        elif index in group:
            block.forward = lambda hidden, *_args, **_kwargs: hidden
    return wide


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
        blocks_of(model)[1:], list(anatomy.blocks[1:]), model.config, None, [], torch.device("cpu")
    )
    with torch.no_grad():
        wide = flatten_blocks(work)
    set_blocks(model, anatomy.blocks_path, [blocks_of(model)[0], wide])
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


def test_the_more_alike_the_less_is_lost(make, flatten, tokens, helpers, tmp_path):
    similar, errors = [], []
    for factor in (1.0, 0.3, 0.1):
        model = make("llama")
        for index in (1, 2):
            for kind in (ATTENTION_OUT, DOWN):
                matrix(output(model, index, kind)).mul_(factor)
        before = helpers.logits(model, tokens)
        similar.append(measured(model, tokens, tmp_path)[2][1])
        flatten(model, PAIR, restore_width=False, refit=False)
        errors.append(helpers.difference(helpers.logits(model, tokens), before))
    assert similar == sorted(similar) and errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 * errors[0]


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


@pytest.mark.parametrize("family", FAMILIES)
def test_the_result_has_the_shapes_of_a_shorter_model(family, make, flatten):
    model = make(family)
    flatten(model, PAIR)
    shorter = make(family, num_hidden_layers=2) if family != "gpt2" else make(family, n_layer=2)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in shorter.state_dict().items()}
    assert all(
        module.layer_idx == index
        for index, block in enumerate(blocks_of(model))
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
    expected = helpers.logits(model, tokens)
    with torch.no_grad():
        first = model(input_ids=tokens[:, :10], use_cache=True)
        steps = [first.logits]
        for position in range(10, tokens.shape[1]):
            first = model(
                input_ids=tokens[:, position : position + 1],
                past_key_values=first.past_key_values, use_cache=True,
            )  # fmt: skip
            steps.append(first.logits)
    assert helpers.difference(torch.cat(steps, 1), expected) < 1e-4


@pytest.fixture
def gram():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    return x, x.T @ x


def test_scores_are_those_of_the_definition(make, gram):
    x, g = gram
    penalty = ridge(g, 0.5)
    assert penalty == pytest.approx(0.5 * float(torch.linalg.svdvals(g).mean()), rel=1e-4)
    expected = torch.diagonal(g.double() @ torch.linalg.inv(g.double() + penalty * torch.eye(12)))
    assert torch.allclose(leverage_scores(g, penalty, "it"), expected, atol=1e-6)
    anatomy = anatomy_of(make("llama")).blocks[0]
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(50, 32, generator=generator)
    weight = torch.randn(32, 32, generator=generator)
    statistics = InputStatistics(32, GRAM)
    statistics.update(inputs)
    scores = head_scores(weight, statistics, anatomy)
    for group in range(2):
        by_hand = 0.0
        for head in (2 * group, 2 * group + 1):
            columns = slice(8 * head, 8 * head + 8)
            weighted = inputs[:, columns] * weight[:, columns].norm(dim=0)
            by_hand += float(weighted.square().sum(1).mean().sqrt())
        assert float(scores[group]) == pytest.approx(by_hand, rel=1e-4)


def test_the_correction_is_the_minimum(gram):
    x, g = gram
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(6, 12, generator=generator)
    every, kept = torch.arange(12), torch.tensor([0, 2, 3, 7, 8, 11])
    assert torch.equal(corrected(weight, g, every, 1.0, "it"), weight)
    plain = relative_error(weight, weight[:, kept], g, kept)
    assert relative_error(weight, corrected(weight, g, kept, 1e-6, "it"), g, kept) < 0.9 * plain
    for penalty in (0.1, 10.0, 1000.0):

        def objective(narrow, penalty=penalty):
            lost = (x @ weight.T - x[:, kept] @ narrow.T).square().sum()
            return float(lost + penalty * (narrow - weight[:, kept]).square().sum())

        found = corrected(weight, g, kept, penalty, "it")
        least = objective(found)
        assert least <= objective(weight[:, kept])
        for _ in range(5):
            shifted = found + 0.01 * torch.randn(found.shape, generator=generator)
            assert objective(shifted) > least


@pytest.mark.parametrize(
    ("family", "compute", "restored"),
    [
        ("llama", torch.float32, True), ("llama", torch.bfloat16, True),
        ("gpt2", torch.float32, True), ("llama", torch.float32, False),
    ],
)  # fmt: skip
def test_the_refit_brings_held_out_text_nearer_to_the_model_as_it_was(
    family, compute, restored, make, tmp_path
):
    ids = torch.randint(5, 200, (60, 16), generator=torch.Generator().manual_seed(3))
    batches = [{"input_ids": part} for part in ids.split(3)]
    held = batches[-1]["input_ids"]  # a twentieth

    class Last(Flatten):
        def decide(self, similarity, anatomy):
            return {"groups": PAIR, "similarity": similarity}

    def returned(model):
        seen = []
        hook = blocks_of(model)[-1].register_forward_hook(lambda _m, _a, out: seen.append(out))
        with torch.no_grad():
            model(held)
        hook.remove()
        return seen[0][0] if isinstance(seen[0], tuple) else seen[0]

    def lost(**options):
        model = make(family)
        target = returned(model)
        compress.apply(
            model,
            [Last(remove=1, restore_width=restored, **options)],
            batches,
            compute=NAMES[compute],
        )
        error = (returned(model) - target).square().sum(-1) / target.square().sum(-1)
        return float(error.sum())

    notes = []
    context = StepContext(
        StreamedModel(make(family)), batches, tmp_path, compute=compute,
        report=lambda stage, index, count, note: notes.append(note),
    )  # fmt: skip
    run_step(Last(remove=1, restore_width=restored), context)
    (note,) = [note for note in notes if isinstance(note, dict) and "refit" in note]
    assert note["refit"] < 1
    tolerance = 1e-3 if compute == torch.float32 else 0.1
    assert lost() / lost(refit=False) == pytest.approx(note["refit"], rel=tolerance)


def test_neurons_that_others_repeat_cost_nothing():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(100, 6, generator=generator).double()
    x = torch.cat([x, x.flip(1)], 1)  # each twice
    weight, kept = torch.randn(4, 12, generator=generator).double(), torch.arange(6)
    errors = []
    for multiple in (1.0, 1e-2, 1e-4):
        narrow = corrected(weight, x.T @ x, kept, ridge(x.T @ x, multiple), "it")
        errors.append(relative_error(weight, narrow, x.T @ x, kept))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-6


def test_the_grid_takes_the_ridge_of_the_least_error(make, tokens, tmp_path):
    def error(**options):
        notes = []
        context = StepContext(
            StreamedModel(make("llama")), [{"input_ids": tokens}], tmp_path,
            report=lambda stage, index, count, note: notes.append(note),
        )  # fmt: skip
        run_step(Flatten(remove=1, **options), context)
        (found,) = [n for n in notes if isinstance(n, dict) and "down.error" in n]
        assert found["down.error"] <= found["down.error_uncorrected"] + 1e-6
        assert found["attention_out.error"] <= found["attention_out.error_uncorrected"] + 1e-6
        return found["down.error"], found["down.ridge"]

    least, chosen = error()
    single = {r: error(ridge=r)[0] for r in (0.001, 0.1, 10.0)}
    assert least <= min(single.values())
    assert error(ridge=chosen)[0] == pytest.approx(least)


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

    class Passing(type(blocks_of(model)[0])):
        def forward(self, hidden_states, *args, **kwargs):
            output = super().forward(hidden_states, *args, **kwargs)
            return output - hidden_states + self.input_layernorm(hidden_states)

    for block in blocks_of(model):
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
