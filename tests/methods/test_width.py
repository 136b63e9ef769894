"""Narrower blocks compute what wide blocks with the same units zeroed compute, or better."""

from __future__ import annotations

import copy

import pytest
import torch
from pydantic import ValidationError

from compress.engine.context import StepContext
from compress.engine.steps import run_step
from compress.errors import CompressError
from compress.linear.matrix import matrix
from compress.methods.factorize.svd import SVD
from compress.methods.sparsity.magnitude import Magnitude
from compress.methods.sparsity.wanda import Wanda
from compress.methods.width.allocation import allocate
from compress.methods.width.ffn import FFNWidth
from compress.methods.width.heads import HeadWidth
from compress.models.anatomy import ATTENTION_OUT, DOWN, anatomy_of
from compress.models.outline import outline_of
from compress.models.stream import StreamedModel
from compress.models.units import unit_columns

FAMILIES = (
    "llama",
    "qwen3",
    "gemma2",
    "phi3",
    "gpt2",
    "gpt_neox",
    "opt",
    "bert",
    "roberta",
    "distilbert",
    "modernbert",
)
METHODS = {DOWN: FFNWidth, ATTENTION_OUT: HeadWidth}
both_parts = pytest.mark.parametrize("kind", (DOWN, ATTENTION_OUT))
all_families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def narrow(tokens, tmp_path):
    """``narrow(model, method)``: run a step in place; returns the decision and the notes."""

    def run(model, method):
        notes = []
        context = StepContext(
            StreamedModel(model),
            [{"input_ids": part} for part in tokens.split(4)],
            tmp_path,
            report=lambda stage, index, count, note: notes.append(note),
        )
        return run_step(method, context), notes

    return run


def output_weights(model, kind):
    return [
        matrix(model.get_submodule(f"{b.path}.{b.site(kind).linears[0]}"))
        for b in anatomy_of(model).blocks
    ]


@all_families
@both_parts
def test_equals_zeroed_units_without_correction(kind, family, tiny, narrow, tokens, helpers):
    model = tiny(family)
    wide = copy.deepcopy(model)
    before = anatomy_of(wide).blocks[0].widths
    narrow(model, METHODS[kind](share=0.5, correction=False))
    for old, new, block in zip(
        output_weights(wide, kind),
        output_weights(model, kind),
        anatomy_of(wide).blocks,
        strict=True,
    ):
        stays = (old[:, :, None] == new[:, None, :]).all(0).any(1)
        whole = stays[unit_columns(block, kind)]
        assert bool((whole.all(1) | ~whole.any(1)).all()), "a unit was cut in two"
        old[:, ~stays] = 0
    after = anatomy_of(model).blocks[0].widths
    changed = {"ffn"} if kind == DOWN else {"heads", "kv_heads"}
    assert after == {k: v // 2 if k in changed else v for k, v in before.items()}
    assert helpers.difference(helpers.logits(model, tokens), helpers.logits(wide, tokens)) < 1e-5


@all_families
@both_parts
@pytest.mark.parametrize("importance", ("residual", "activation"))
def test_dead_units_go_first(kind, family, importance, tiny, narrow, tokens, helpers):
    model = tiny(family)
    for weight, block in zip(output_weights(model, kind), anatomy_of(model).blocks, strict=True):
        weight[:, unit_columns(block, kind)[::2].reshape(-1)] = 0
    expected = helpers.logits(model, tokens)
    narrow(model, METHODS[kind](share=0.5, importance=importance))
    assert helpers.difference(helpers.logits(model, tokens), expected) < 1e-5


@pytest.mark.parametrize("importance", ("residual", "activation", "magnitude"))
@both_parts
def test_correction_lowers_the_error(kind, importance, tiny, narrow):
    _, notes = narrow(tiny("llama"), METHODS[kind](share=0.5, importance=importance))
    for note in notes:
        assert 0 < note[f"{kind}.error"] < 0.9 * note[f"{kind}.error_uncorrected"]


def test_a_neuron_that_others_copy_costs_nothing(tiny, narrow, tokens, helpers):
    model = tiny("llama")
    for layer in model.model.layers:
        for producer in (layer.mlp.gate_proj, layer.mlp.up_proj):
            producer.weight.data[32:] = producer.weight.data[:32]
    expected = helpers.logits(model, tokens)
    # Each copy has the energy of its original; what tells them from the rest is the residual.
    narrow(model, FFNWidth(share=0.5, importance="residual", damping=1e-7))
    assert helpers.difference(helpers.logits(model, tokens), expected) < 1e-2


@both_parts
def test_no_share_changes_nothing(kind, tiny, narrow):
    model = tiny("gpt2")
    before = copy.deepcopy(model.state_dict())
    narrow(model, METHODS[kind](share=0))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@both_parts
def test_same_twice(kind, tiny, narrow):
    models = [tiny("qwen3"), tiny("qwen3")]
    for model in models:
        narrow(model, METHODS[kind](share=0.5, allocation="per_layer"))
    for one, other in zip(*(m.state_dict().values() for m in models), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("importance", ("residual", "activation", "magnitude"))
def test_widths_by_layer_keep_the_total(importance, tiny, narrow, tokens, helpers):
    model = tiny("llama")
    with torch.no_grad():
        # In the middle block three quarters of the neurons hardly matter.
        model.model.layers[1].mlp.down_proj.weight[:, 16:] *= 1e-3
        model.model.layers[1].mlp.up_proj.weight[16:] *= 1e-3
    decision, _ = narrow(
        model, FFNWidth(share=0.25, allocation="per_layer", importance=importance, round_to=4)
    )
    widths = [block.ffn for block in anatomy_of(model).blocks]
    assert widths == decision
    assert sum(widths) == 3 * 48
    assert widths[1] < min(widths[0], widths[2])
    assert all(w % 4 == 0 for w in widths)
    assert torch.isfinite(helpers.logits(model, tokens)).all()


def test_allocation_respects_bounds():
    scores = [[1.0] * 8, [0.001] * 7 + [1.0], [float(i) for i in range(8)]]
    free = allocate(scores, 12, 2, 0.0, 0.9)
    bounded = allocate(scores, 12, 2, 0.25, 0.5)
    assert sum(free) == sum(bounded) == 12
    assert free[1] == 2
    assert all(4 <= kept <= 6 for kept in bounded)
    assert all(kept % 2 == 0 for kept in free)


@pytest.mark.parametrize("family", ("llama", "gpt2", "phi3"))
@both_parts
def test_zeros_survive_and_the_fit_makes_up_for_them(kind, family, tiny, narrow):
    model = tiny(family)
    narrow(model, Wanda(sparsity=0.5))
    _, notes = narrow(model, METHODS[kind](share=0.5))
    for block in anatomy_of(model).blocks:
        for name in block.linears:
            share = float((matrix(model.get_submodule(f"{block.path}.{name}")) == 0).float().mean())
            assert share > 0.3, name
    for note in notes:
        assert note[f"{kind}.error"] < note[f"{kind}.error_uncorrected"]


@both_parts
def test_patterns_survive(kind, tiny, narrow):
    model = tiny("llama")
    narrow(model, Magnitude(pattern="2:4"))
    narrow(model, METHODS[kind](share=0.5))
    for weight in output_weights(model, kind):
        assert int((weight.reshape(-1, 4) != 0).sum(1).max()) == 2


def test_width_that_breaks_a_pattern_is_refused(tiny, narrow):
    model = tiny("llama")
    narrow(model, Magnitude(pattern="2:4"))
    with pytest.raises(CompressError, match="before the sparsity step"):
        narrow(model, FFNWidth(keep=30, round_to=1))


@pytest.mark.parametrize(
    ("family", "fields", "method", "message"),
    (
        ("albert", {}, FFNWidth(share=0.5), "layers share one set"),
        ("llama", {}, FFNWidth(keep=72), "at most 64 neurons"),
        ("llama", {}, FFNWidth(share=0.01), "rounds to none"),
        ("llama", {}, HeadWidth(share=0.1), "rounds to none"),
        ("mamba", {}, HeadWidth(share=0.5), "KV groups that the toolkit recognises"),
    ),
)
def test_refused_before_any_work(family, fields, method, message, tiny):
    model = tiny(family, **fields)
    anatomy = anatomy_of(model)
    with pytest.raises(CompressError, match=message):
        method.check(anatomy, outline_of(model, anatomy, 16))


def test_norms_over_all_heads_are_refused():
    from transformers import Olmo2Config, Olmo2ForCausalLM

    config = Olmo2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = Olmo2ForCausalLM(config)
    anatomy = anatomy_of(model)
    outline = outline_of(model, anatomy, 16)
    FFNWidth(share=0.5).check(anatomy, outline)
    with pytest.raises(CompressError, match="q_norm, which joins"):
        HeadWidth(share=0.5).check(anatomy, outline)


@pytest.mark.parametrize(
    "options",
    ({}, {"share": 0.5, "keep": 8}, {"keep": 9}, {"share": 0.6, "allocation": "per_layer",
     "max_share": 0.5}),
)  # fmt: skip
def test_options_that_contradict(options):
    with pytest.raises(ValidationError):
        FFNWidth(**options)


@all_families
@both_parts
def test_plan_predicts_the_size(kind, family, tiny, narrow):
    model = tiny(family)
    anatomy = anatomy_of(model)
    method = METHODS[kind](share=0.5)
    outline = outline_of(model, anatomy, 16)
    if not (kind == ATTENTION_OUT and anatomy.family.fixed_heads):
        method.check(anatomy, outline)
    predicted = method.predict(outline)
    narrow(model, method)
    found = outline_of(model, anatomy_of(model), 16)
    assert predicted.parameters == found.parameters
    assert predicted.blocks == found.blocks


@both_parts
def test_low_rank_pairs_are_narrowed(kind, tiny, narrow, tokens, helpers):
    model = tiny("gpt2")
    narrow(model, SVD(ratio=0.6))
    for block in anatomy_of(model).blocks:
        pair = model.get_submodule(f"{block.path}.{block.site(kind).linears[0]}")
        pair.first.weight.data[:, unit_columns(block, kind)[1::2].reshape(-1)] = 0
    expected = helpers.logits(model, tokens)
    narrow(model, METHODS[kind](share=0.5))
    assert helpers.difference(helpers.logits(model, tokens), expected) < 1e-5
    for block in anatomy_of(model).blocks:
        pair = model.get_submodule(f"{block.path}.{block.site(kind).linears[0]}")
        assert pair.in_features == (32 if kind == DOWN else 16)
