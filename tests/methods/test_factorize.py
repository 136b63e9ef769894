"""Low-rank pairs: exact where nothing is lost, ordered by what they know of the inputs."""

from __future__ import annotations

import copy

import pytest
import torch

import compress
from compress.engine.context import StepContext
from compress.engine.steps import run_step
from compress.errors import CompressError
from compress.linear.algebra import principal_outputs
from compress.linear.low_rank import LowRankLinear
from compress.linear.statistics import GRAM, InputStatistics
from compress.methods.factorize.asvd import ASVD
from compress.methods.factorize.base import low_rank
from compress.methods.factorize.svd import SVD
from compress.methods.factorize.svd_llm import SVDLLM
from compress.methods.quantize.rtn import RoundToNearest
from compress.methods.sparsity.magnitude import Magnitude
from compress.models.anatomy import anatomy_of
from compress.models.outline import outline_of
from compress.models.stream import StreamedModel

METHODS = (SVD, ASVD, SVDLLM)
sizes = pytest.mark.parametrize("shape", ((12, 20), (20, 12), (16, 16)))


@pytest.fixture
def factorize(tokens, tmp_path):
    def run(model, method):
        notes = []
        context = StepContext(
            StreamedModel(model),
            [{"input_ids": part} for part in tokens.split(4)],
            tmp_path,
            report=lambda stage, index, count, note: notes.append(note),
        )
        run_step(method, context)
        return notes

    return run


def correlated(rows, width, generator):
    """Inputs [rows, width] whose features differ in size and hang together."""
    mix = torch.randn(width, width, generator=generator) * torch.logspace(0, -2, width)
    return torch.randn(rows, width, generator=generator) @ mix.t()


@sizes
def test_full_rank_loses_nothing(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    linear = torch.nn.Linear(shape[1], shape[0])
    linear.weight.data = weight
    basis, lost = principal_outputs(weight, min(shape))
    x = torch.randn(5, shape[1])
    torch.testing.assert_close(low_rank(linear, basis)(x), linear(x), rtol=1e-4, atol=1e-5)
    assert lost < 1e-9


@sizes
@pytest.mark.parametrize("metric", ("none", "scale", "gram"))
def test_what_is_lost_is_the_dropped_singular_values(shape, metric):
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = correlated(200, shape[1], generator).double()
    scale = x.abs().mean(0)
    gram = x.t() @ x
    root, known = {
        "none": (torch.eye(shape[1], dtype=torch.float64), {}),
        "scale": (scale.diag(), {"scale": scale}),
        "gram": (torch.linalg.cholesky(gram), {"gram": gram}),
    }[metric]
    rank = 5
    basis, lost = principal_outputs(weight, rank, **known)
    left, values, right = torch.linalg.svd(weight @ root, full_matrices=False)
    truncated = left[:, :rank] * values[:rank] @ right[:rank] @ root.inverse()
    torch.testing.assert_close(basis @ (basis.t() @ weight), truncated, rtol=1e-6, atol=1e-8)
    error = torch.linalg.norm((weight - basis @ basis.t() @ weight) @ root)
    assert float(error) == pytest.approx(float(values[rank:].square().sum().sqrt()), rel=1e-6)
    assert lost == pytest.approx(float(values[rank:].square().sum() / values.square().sum()))


@sizes
def test_dead_and_collinear_inputs(shape):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(shape, generator=generator)
    x = torch.randn(50, 4, generator=generator) @ torch.randn(4, shape[1], generator=generator)
    x[:, 3] = 0
    basis, lost = principal_outputs(weight, 4, gram=x.t() @ x)
    expected = x @ weight.t()
    torch.testing.assert_close((expected.double() @ basis @ basis.t()).float(), expected)
    assert lost < 1e-6
    torch.testing.assert_close(basis.t() @ basis, torch.eye(4, dtype=torch.float64))


@sizes
def test_more_knowledge_less_error(shape):
    errors = torch.zeros(3)
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(shape, generator=generator)
        x = correlated(300, shape[1], generator)
        gram = x.t() @ x
        for i, known in enumerate(({}, {"scale": x.abs().mean(0).sqrt()}, {"gram": gram})):
            basis = principal_outputs(weight, 4, **known)[0].float()
            y = x @ weight.t()
            errors[i] += torch.linalg.norm(y - y @ basis @ basis.t()) / torch.linalg.norm(y)
    assert errors[2] < errors[1] < errors[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ("llama", "gpt2", "phi3", "gpt_neox", "opt", "bert"))
def test_runs_and_predicts(method, family, tiny, factorize, tokens, helpers):
    model = tiny(family)
    anatomy = anatomy_of(model)
    step = method(ratio=0.5)
    outline = outline_of(model, anatomy, 16)
    step.check(anatomy, outline)
    predicted = step.predict(outline)
    before = helpers.logits(model, tokens)
    notes = factorize(model, step)
    found = outline_of(model, anatomy_of(model), 16)
    assert predicted.parameters == found.parameters
    assert predicted.blocks == found.blocks
    assert helpers.difference(helpers.logits(model, tokens), before) > 1e-3
    pairs = [m for m in model.modules() if isinstance(m, LowRankLinear)]
    assert len(pairs) == sum(len(b.linears) for b in anatomy.blocks)
    assert len(pairs) == sum(key.endswith(".rank") for note in notes for key in note)


def test_low_rank_models_are_reproduced(tiny, factorize, tokens, helpers):
    for method in METHODS:
        model = tiny("gpt2")
        for block in anatomy_of(model).blocks:
            for name in block.linears:
                weight = model.get_submodule(f"{block.path}.{name}").weight.data
                left, values, right = torch.linalg.svd(weight, full_matrices=False)
                weight.copy_(left[:, :6] * values[:6] @ right[:6])
        expected = helpers.logits(model, tokens)
        factorize(model, method(rank=6))
        assert helpers.difference(helpers.logits(model, tokens), expected) < 1e-4, method.name


def test_matrices_that_would_grow_are_left_alone(tiny, factorize):
    model = tiny("llama")
    # 20 x (32 + 32) > 32 x 32, but 20 x (32 + 64) < 32 x 64.
    notes = factorize(model, SVD(rank=20))
    layer = model.model.layers[0]
    assert isinstance(layer.self_attn.q_proj, torch.nn.Linear)
    assert isinstance(layer.mlp.up_proj, LowRankLinear)
    assert notes[0]["qkv.self_attn.q_proj.left_alone"] == 1


def test_ranks_are_rounded(tiny):
    assert SVD(ratio=0.5).rank_of(48, 32) == 9
    assert SVD(ratio=0.5, round_to=4).rank_of(48, 32) == 8
    assert SVD(ratio=0.01).rank_of(48, 32) == 1


def test_same_twice(tiny, factorize):
    models = [tiny("opt"), tiny("opt")]
    for model in models:
        factorize(model, SVDLLM(ratio=0.5))
    for one, other in zip(*(m.state_dict().values() for m in models), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("earlier", "message"),
    (
        (RoundToNearest(bits=4, group_size=16), "before the quantisation"),
        (Magnitude(sparsity=0.5), "before the sparsity step"),
        (SVD(ratio=0.5), "Factorise a layer once"),
    ),
)
def test_orders_that_cannot_work(earlier, message, tiny, factorize):
    model = tiny("llama")
    anatomy = anatomy_of(model)
    outline = earlier.predict(outline_of(model, anatomy, 16))
    with pytest.raises(CompressError, match=message):
        SVD(ratio=0.5).check(anatomy, outline)
    factorize(model, earlier)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CompressError, match=message):
        factorize(model, SVD(ratio=0.5))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_nothing_to_gain_is_refused(tiny):
    model = tiny("llama")
    anatomy = anatomy_of(model)
    with pytest.raises(CompressError, match="Lower the rank"):
        SVD(rank=32).check(anatomy, outline_of(model, anatomy, 16))


def test_broken_statistics_are_refused():
    statistics = InputStatistics(8, GRAM)
    statistics.update(torch.full((4, 8), float("nan")))
    with pytest.raises(CompressError, match="NaN or infinity"):
        SVDLLM(ratio=0.5).directions(torch.randn(8, 8), 2, statistics, "layer")


def test_neither_factor_grows_with_how_little_an_output_matters(tiny, tokens, monkeypatch):
    """Experts that hardly see a token have gradients of next to nothing."""
    from compress.methods.factorize import fwsvd

    found = fwsvd.output_weights
    monkeypatch.setattr(fwsvd, "output_weights", lambda *given: 1e-15 * found(*given))
    model = tiny("llama")
    compress.apply(model, [{"method": "fwsvd", "ratio": 0.6}], tokens)
    layers = [m for m in model.modules() if isinstance(m, LowRankLinear)]
    assert layers
    for layer in layers:
        sizes = [p.abs().max() for p in layer.parameters()]
        assert max(sizes) < 1e6 * min(sizes)
