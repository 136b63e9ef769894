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
from compress.linear.algebra import principal_outputs
from compress.linear.atoms import Atoms
from compress.linear.dense_sparse import DenseSparseLinear, index_dtype, stored_bytes
from compress.linear.dictionary import Form, factorise, packed
from compress.linear.sparse_coding import CODERS, coding_loss
from compress.methods.factorize.dense_sparse import DenseSparseMethod
from compress.methods.factorize.forms import form_for
from compress.methods.factorize.sensitivity import LEVELS, losses, shared_out
from compress.models.stream import StreamedModel

HALF = {"method": "dense_sparse", "ratio": 0.5, "rounds": 2}


@pytest.fixture(scope="module")
def problem():
    """A weight [48, 32] and a metric in which its inputs hang together."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(32, 32, generator=generator)
    inputs = torch.randn(200, 32, generator=generator) @ mix
    return torch.randn(48, 32, generator=generator), inputs.t() @ inputs


def solved(problem, form, rounds=4, coding="directions"):
    return factorise(*problem, form, rounds, coding, torch.Generator().manual_seed(0))


def lost(problem, product):
    weight, metric = problem
    wrong = weight - product
    return float(((wrong @ metric) * wrong).sum() / ((weight @ metric) * weight).sum())


@pytest.mark.parametrize("coding", CODERS)
def test_every_output_is_made_of_k_different_atoms_a_block(problem, coding):
    form = Form(blocks=2, rank=20, nonzeros=5)
    _, indices = packed(solved(problem, form, 2, coding), form)
    blocks = indices.view(48, 2, 5)
    assert bool((blocks.diff(dim=2) > 0).all())  # ascending, so none twice
    assert int(blocks.min()) >= 0 and int(blocks.max()) < 20


def test_a_column_of_zeros_has_as_many_entries_as_any(problem):
    weight, metric = problem[0].clone(), problem[1]
    weight[3] = 0
    form = Form(2, 20, 5)
    values, indices = packed(solved((weight, metric), form, 2), form)
    assert indices.shape == (48, 10) and not values[3].any()


@pytest.mark.parametrize("coding", CODERS)
def test_no_round_is_worse_and_the_error_is_what_is_said(problem, coding):
    found = solved(problem, Form(2, 24, 6), 5, coding)
    assert all(b <= a * (1 + 1e-4) for a, b in zip(found.errors, found.errors[1:], strict=False))
    assert found.errors[-1] == pytest.approx(lost(problem, found.product()), rel=1e-3)


def test_all_atoms_of_one_block_are_the_truncated_svd(problem):
    weight, metric = problem
    found = solved(problem, Form(1, 12, 12), 1)
    assert found.errors[-1] == pytest.approx(
        principal_outputs(weight, 12, gram=metric)[1], rel=1e-3
    )


def test_the_error_falls_with_atoms_and_with_nonzeros(problem):
    def error(rank, nonzeros):
        return solved(problem, Form(2, rank, nonzeros)).errors[-1]

    assert error(24, 3) > error(24, 6) > error(24, 12)
    assert error(12, 6) > error(24, 6) > error(40, 6)


def test_one_atom_an_output_is_as_good_as_clusters_of_directions(problem):
    """k = 1, one block: gain-shape quantisation, in which each output goes with its best atom."""
    weight, metric = problem
    found = solved(problem, Form(1, 8, 1), 6)
    atoms = found.atoms[0]
    along = (weight @ metric @ atoms.t()).square() / ((atoms @ metric) * atoms).sum(1)
    best = along.amax(1).sum() / ((weight @ metric) * weight).sum()
    assert found.errors[-1] == pytest.approx(1 - float(best), rel=0.05)


def test_coders_in_the_order_of_their_price(problem):
    """Pursuit looks at what is left, correlation does not; directions take atoms back."""
    generator = torch.Generator().manual_seed(0)
    atoms = Atoms(torch.randn(2, 20, 12, generator=generator), problem[1][:24, :24])
    targets = atoms.answers(torch.randn(64, 24, generator=generator))
    loss = {
        name: float(coding_loss(code(targets, atoms, 2, 6, None), targets, atoms).sum())
        for name, code in CODERS.items()
    }
    assert loss["directions"] < loss["pursuit"] < loss["correlation"]


@pytest.mark.parametrize(("blocks", "rank", "width"), [(4, 17, 8), (2, 5, 16), (1, 40, 8)])
def test_products_with_atoms_are_those_with_their_matrix(blocks, rank, width):
    """Of unit energy, and the same whether the matrix of products is formed or not."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(90, blocks * width, generator=generator)
    metric = inputs.t() @ inputs / 90
    dictionary = torch.randn(blocks, rank, width, generator=generator)
    atoms = Atoms(dictionary, metric)
    flat = torch.block_diag(*(dictionary * atoms.scale.view(blocks, rank, 1)))
    gram = flat @ metric @ flat.t()
    x = torch.randn(7, blocks * rank, generator=generator)
    rows = torch.randn(7, blocks * width, generator=generator)
    torch.testing.assert_close(gram.diagonal(), torch.ones(blocks * rank))
    torch.testing.assert_close(atoms.matrix(), gram, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(atoms.times(x), x @ gram, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(atoms.answers(rows), rows @ metric @ flat.t(), rtol=1e-4, atol=1e-4)
    for shift in (0.03, 1.0):
        wanted = torch.linalg.solve((gram + shift * torch.eye(len(gram))).double(), x.double().t())
        found = atoms.shifted_inverse(shift)(x)
        torch.testing.assert_close(found, wanted.t().float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(576, 576), (192, 576), (1536, 576), (576, 1536), (64, 48)])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
def test_a_form_takes_the_bytes_that_it_is_given(shape, ratio):
    for value_bytes in (2, 4):
        form = form_for(*shape, ratio, value_bytes, 2.0)
        budget = ratio * shape[0] * shape[1] * value_bytes
        size = stored_bytes(*shape, form.blocks, form.rank, form.nonzeros, value_bytes)
        one_more = shape[1] * value_bytes  # a full dictionary, or less than one atom more
        assert size <= budget and (form.rank == 256 or budget - size < one_more)
        assert shape[1] % form.blocks == 0 and form.nonzeros <= form.rank


def test_shares_go_where_they_save_most():
    generator = torch.Generator().manual_seed(0)
    flat, steep = torch.ones(20, 20), torch.randn(20, 20, generator=generator) ** 5
    curves = {"flat": losses(flat, torch.ones(20)), "steep": losses(steep, torch.ones(20))}
    shares = shared_out(curves, {"flat": 400, "steep": 400}, 0.5)
    assert shares["flat"] > shares["steep"] >= LEVELS[0]
    assert sum(shares.values()) == pytest.approx(1.0, abs=0.051)


@pytest.fixture(scope="module")
def layer(problem):
    form = Form(2, 20, 5)
    values, indices = packed(solved(problem, form), form)
    made = DenseSparseLinear(32, 48, 2, 20, 5, bias=True)
    found = solved(problem, form)
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
