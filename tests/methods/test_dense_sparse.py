"""Dense dictionary times sparse coefficients: the form, the bytes, and what may be done with it."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

import compress
from compress.conformance.models import build
from compress.engine.context import StepContext
from compress.engine.steps import run_step
from compress.errors import CompressError
from compress.eval.cost.macs import macs_per_token
from compress.linear import routes
from compress.linear.dense_sparse import DenseSparseLinear, index_dtype, stored_bytes
from compress.linear.dictionary import Form, factorise, packed
from compress.methods.factorize.dense_sparse import DenseSparseMethod
from compress.models.stream import StreamedModel

HALF = {"method": "dense_sparse", "ratio": 0.5, "rounds": 2}


@pytest.fixture(scope="module")
def layer():
    """A layer [48, 32] of two blocks with 20 atoms each, five of them to an output."""
    generator, form = torch.Generator().manual_seed(3), Form(2, 20, 5)
    weight = torch.randn(48, 32, generator=generator)
    found = factorise(weight, torch.eye(32), form, 2, "directions", generator)
    values, indices = packed(found, form)
    made = DenseSparseLinear(32, 48, 2, 20, 5, bias=True)
    made.dictionary.weight.data = found.atoms.flatten(0, 1)
    made.values.weight.data, made.indices = values, indices.to(torch.uint8)
    made.bias.data.normal_()
    torch.testing.assert_close(made.dense(), found.product(), rtol=1e-5, atol=1e-5)
    return made.eval()


@torch.no_grad()
def test_all_ways_compute_the_same(layer, monkeypatch):
    x = torch.randn(3, 5, 32)
    expected = functional.linear(x, layer.dense(), layer.bias)
    torch.testing.assert_close(layer(x), expected)
    monkeypatch.setattr(layer, "serving", True)
    for number in (0, 1):
        monkeypatch.setattr(routes, "_FOUND", {})
        monkeypatch.setattr(
            routes, "_round", lambda r, _x, n=number: [float(i != n) for i in (0, 1)]
        )
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_it_keeps_follows_its_weights(layer, monkeypatch):
    monkeypatch.setattr(layer, "serving", True)
    x = torch.randn(40, 32)
    before = layer(x)
    layer.values.weight.mul_(2)
    torch.testing.assert_close(
        layer(x) - layer.bias, 2 * (before - layer.bias), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("fused", [False, True])
def test_what_it_keeps_does_not_outlive_a_training(layer, fused):
    """In eval mode, too; fused optimisers raise no tensor's version."""
    made = copy.deepcopy(layer)
    made.serving = True
    optimiser = torch.optim.AdamW(made.parameters(), lr=0.1, fused=fused)
    x = torch.randn(40, 32)
    for _ in range(2):
        with torch.no_grad():
            made(x)
        made(x).square().sum().backward()
        optimiser.step()
    with torch.no_grad():
        torch.testing.assert_close(made(x), functional.linear(x, made.dense(), made.bias))
        assert copy.deepcopy(made)(x).equal(made(x))  # with what it keeps


def test_a_serving_layer_in_mixed_types_and_beside_a_gradient(layer):
    made = copy.deepcopy(layer).requires_grad_(False)
    made.serving = True
    x = torch.randn(3, 32, requires_grad=True)
    made(x).sum().backward()
    torch.testing.assert_close(x.grad, made.dense().sum(0).expand(3, -1), rtol=1e-4, atol=1e-4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(made(x), functional.linear(x, made.dense(), made.bias))
    torch.testing.assert_close(made(x), functional.linear(x, made.dense(), made.bias))


@torch.no_grad()
@pytest.mark.parametrize("serving", [False, True])
def test_shapes_pass_a_layer_without_memory(layer, serving):
    made = copy.deepcopy(layer).to("meta")
    made.serving = serving
    for tokens in (3, 40):
        assert made(torch.empty(tokens, 32, device="meta")).shape == (tokens, 48)


def test_gradients_reach_dictionary_and_values(layer):
    layer(torch.randn(4, 32)).square().sum().backward()
    assert all(t.weight.grad.abs().sum() > 0 for t in (layer.dictionary, layer.values))


def test_indices_are_as_narrow_as_they_can_be():
    assert (index_dtype(256), index_dtype(257)) == (torch.uint8, torch.uint16)
    assert stored_bytes(10, 6, 2, 300, 3, 4) == 4 * (6 * 300 + 60) + 2 * 60


@pytest.fixture(scope="module")
def halved(tmp_path_factory):
    """``halved()``: a tiny llama at half the bytes, saved once, and its folder."""
    model = build("llama")
    ids = torch.randint(
        3, model.config.vocab_size, (4, 12), generator=torch.Generator().manual_seed(1)
    )
    compress.apply(model, [HALF], ids)
    folder = tmp_path_factory.mktemp("halved")
    compress.save(model, folder / "model")
    return model, folder / "model"


def test_the_file_is_as_large_as_the_formula_says(halved):
    model, folder = halved
    tensors = load_file(folder / "model.safetensors")
    prefix = "model.layers.0.mlp.up_proj."
    found = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    assert found["indices"].dtype == torch.uint8
    layer = model.model.layers[0].mlp.up_proj
    spec = layer.spec()
    said = stored_bytes(
        layer.out_features, layer.in_features, spec.blocks, spec.rank, spec.nonzeros, 4
    )
    assert sum(t.nbytes for t in found.values()) == said
    assert said <= 2 * layer.out_features * layer.in_features


def test_materialized_it_loads_without_us(halved, tokens, helpers, tmp_path):
    model, folder = halved
    assert compress.materialize(folder, tmp_path / "plain") == 21
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert plain.config.model_type == "llama"
    assert not any(isinstance(m, DenseSparseLinear) for m in plain.modules())
    torch.testing.assert_close(
        helpers.logits(plain, tokens), helpers.logits(model, tokens), rtol=1e-4, atol=1e-4
    )
    with pytest.raises(CompressError, match="layers that stand for matrices"):
        compress.materialize(tmp_path / "plain", tmp_path / "again")


def test_a_loaded_model_serves_and_a_live_one_does_not(halved):
    model, folder = halved
    loaded, _ = compress.load(folder)
    assert loaded.model.layers[0].mlp.up_proj.serving
    assert not model.model.layers[0].mlp.up_proj.serving


def test_products_are_counted_once_and_as_a_plain_linears(halved, tiny):
    model, folder = halved
    wanted = macs_per_token(tiny("llama"))
    for made in (model, compress.load(folder)[0]):
        for _ in range(2):  # whatever it keeps by then
            assert macs_per_token(made) == wanted


def test_a_loaded_model_that_learns_is_what_is_saved(halved, tokens, helpers, tmp_path):
    loaded, _ = compress.load(halved[1])
    before = helpers.logits(loaded, tokens)  # from now on matrices are kept
    training = {"steps": 3, "batch": 2, "learning_rate": 1e-2}
    compress.apply(
        loaded, [{"method": "distill", "scope": "block", "train": "full", "training": training}],
        tokens, teacher=build("llama"),
    )  # fmt: skip
    after = helpers.logits(loaded, tokens)
    assert not torch.equal(after, before)
    assert loaded.model.layers[0].mlp.up_proj.serving
    compress.save(loaded, tmp_path / "saved")
    again = helpers.logits(compress.load(tmp_path / "saved")[0], tokens)
    torch.testing.assert_close(again, after, rtol=1e-4, atol=1e-4)


def test_a_form_that_takes_more_than_the_matrix_leaves_it_alone(tiny, tokens):
    model = tiny("llama")
    compress.apply(
        model, [{"method": "dense_sparse", "rank": 24, "nonzeros": 4, "rounds": 1}], tokens
    )
    attention = model.model.layers[0].self_attn
    assert isinstance(attention.q_proj, DenseSparseLinear)
    assert not isinstance(attention.k_proj, DenseSparseLinear)


def test_the_seed_of_a_run_is_that_of_its_dictionaries(tiny, tokens):
    step = {"method": "dense_sparse", "blocks": 4, "rank": 16, "nonzeros": 2, "rounds": 1}
    found = []
    for seed, own in ((0, {}), (1, {}), (1, {"seed": 0})):
        model = tiny("llama")
        compress.apply(model, [{**step, **own}], tokens, seed=seed)
        found.append(model.model.layers[0].mlp.up_proj.dictionary.weight)
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


def test_conv1d_and_low_rank_are_materialized(tiny, tokens, helpers, tmp_path):
    model = tiny("gpt2")
    compress.apply(model, [{"method": "svd", "ratio": 0.5}], tokens)
    compress.save(model, tmp_path / "thin")
    compress.materialize(tmp_path / "thin", tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert plain.config.model_type == "gpt2"
    torch.testing.assert_close(
        helpers.logits(plain, tokens), helpers.logits(model, tokens), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    "step",
    [{"method": "rtn", "bits": 8, "group_size": None},
     {"method": "gptq", "bits": 4, "group_size": None}],
    ids=["8-bit", "4-bit"],
)  # fmt: skip
def test_dictionary_and_values_are_rounded(step, tiny, tokens, helpers, tmp_path):
    model = tiny("llama")
    compress.apply(model, [HALF, step], tokens)
    layer = model.model.layers[1].mlp.down_proj
    assert all(table.scheme.bits == step["bits"] for table in (layer.dictionary, layer.values))
    compress.save(model, tmp_path / "rounded")
    for loaded in (
        compress.load(tmp_path / "rounded")[0],
        AutoModelForCausalLM.from_pretrained(tmp_path / "rounded"),
    ):
        torch.testing.assert_close(
            helpers.logits(loaded, tokens), helpers.logits(model, tokens), rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize(
    "step",
    [{"method": "magnitude", "pattern": "2:4"}, {"method": "svd", "ratio": 0.5},
     {"method": "ffn_width", "share": 0.5},
     {"method": "distill", "train": "lora", "norms": False, "training": {"steps": 1}}],
    ids=lambda step: step["method"],
)  # fmt: skip
def test_steps_without_a_use_for_it_refuse_it(step, halved, tokens):
    with pytest.raises(CompressError, match="dense_sparse"):
        compress.apply(halved[0], [step], tokens)


def test_refined_blocks_are_nearer_to_the_dense_ones(tiny, tokens, tmp_path):
    training = {"steps": 20, "batch": 2, "learning_rate": 1e-2, "clip": None}
    notes = []
    context = StepContext(
        StreamedModel(tiny("llama")), [{"input_ids": part} for part in tokens.split(1)], tmp_path,
        report=lambda _stage, _index, _count, note: notes.append(note),
    )  # fmt: skip
    run_step(DenseSparseMethod(ratio=0.3, rounds=2, refine=training), context)
    assert sum(n["refine.after"] for n in notes) < sum(n["refine.before"] for n in notes)


def test_outputs_on_which_the_loss_depends_lose_less(tiny, tokens):
    """Nothing reads the second head's values, so the dictionaries are for the first one's."""
    lost = {}
    for weighting in ("activation", "fisher"):
        model = tiny("llama")
        first = model.model.layers[0].self_attn
        first.o_proj.weight.data[:, 16:] = 0
        weight = first.v_proj.weight.detach().clone()
        step = {**HALF, "weighting": weighting, "windows": 2, "include": ["*layers.0.*v_proj"]}
        compress.apply(model, [step], tokens)
        error = (first.v_proj.dense() - weight).square().sum(1)
        lost[weighting] = float(error[:8].sum()), float(error[8:].sum())
    assert lost["fisher"][0] < 0.8 * lost["activation"][0]
    assert lost["fisher"][1] > lost["activation"][1]


def test_sensitivity_keeps_the_whole_within_its_bytes(tiny, tokens):
    model = tiny("llama")
    compress.apply(model, [{**HALF, "allocation": "sensitivity"}], tokens)
    layers = [m for m in model.modules() if isinstance(m, DenseSparseLinear)]
    forms = {(m.spec(), m.out_features, m.in_features) for m in layers}
    assert len(forms) > len({(m.out_features, m.in_features) for m in layers})
    plain = sum(4 * m.out_features * m.in_features for m in layers)
    left_alone = 21 - len(layers)
    size = sum(
        stored_bytes(m.out_features, m.in_features, m.blocks, m.rank, m.nonzeros, 4) for m in layers
    )
    assert left_alone or size <= 0.5 * plain


@pytest.mark.parametrize(
    "options",
    [{}, {"ratio": 0.5, "rank": 4}, {"rank": 4}, {"rank": 4, "nonzeros": 5},
     {"ratio": 0.5, "blocks": 2}, {"ratio": 0.2, "allocation": "sensitivity"}],
)  # fmt: skip
def test_options_that_contradict_each_other_are_refused(options, tiny, tokens):
    with pytest.raises(CompressError):
        compress.apply(tiny("llama"), [{"method": "dense_sparse", **options}], tokens)
