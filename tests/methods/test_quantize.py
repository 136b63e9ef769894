"""RTN, GPTQ, W8A8: on the grid, near the weights, GPTQ nearer to the outputs."""

from __future__ import annotations

import copy

import pytest
import torch

import compress
from compress.linear.statistics import GRAM, InputStatistics
from compress.methods.catalog import METHODS
from compress.methods.quantize.gptq import GPTQ
from compress.methods.quantize.rtn import W8A8, RoundToNearest
from compress.methods.work import SiteWork
from compress.models.anatomy import anatomy_of


@pytest.fixture
def layer(tiny):
    """``layer(method, inputs)``: weight [32, 64] before, and the quantised module after."""

    def solve(method, x: torch.Tensor, prepare=None):
        model = tiny("llama")
        anatomy = anatomy_of(model).blocks[0]
        block, site = model.get_submodule(anatomy.path), anatomy.site("down")
        statistics = InputStatistics(x.shape[-1], GRAM)
        statistics.update(x)
        (name,) = site.linears
        work = SiteWork(block, anatomy, site, (name,), {name: statistics})
        if prepare is not None:
            prepare(work.linear(name))
        before = work.weight(name).clone()
        with torch.no_grad():
            method.solve(work)
        return before, work.linear(name)

    return solve


@pytest.fixture
def x() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(64, 64, generator=generator) / 8 + torch.eye(64)
    scales = torch.rand(64, generator=generator) * 3 + 0.1
    return torch.randn(400, 64, generator=generator) @ mixing * scales


def error(before: torch.Tensor, after: torch.Tensor, x: torch.Tensor) -> float:
    return float((x @ (before - after).t()).square().sum())


OPTIONS = [
    {"bits": 4, "group_size": 16},
    {"bits": 3, "group_size": 16, "symmetric": False},
    {"bits": 4, "group_size": None},
    {"bits": 2, "group_size": 32, "symmetric": False},
    {"bits": 8, "group_size": None, "symmetric": False},
    {"bits": 4, "group_size": 16, "observer": "mse"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("method", [RoundToNearest, GPTQ])
def test_weights_lie_on_the_grid(method, options, layer, x):
    before, after = layer(method(**options), x)
    codes = after.quantized_values()
    half = 2 ** (options["bits"] - 1)
    assert int(codes.min()) >= -half and int(codes.max()) <= half - 1
    groups = 64 // (options["group_size"] or 64)
    assert after.weight_scale.shape == (32, groups)
    assert (after.weight_zero_point is None) == options.get("symmetric", True)
    zero = 0 if after.weight_zero_point is None else after.weight_zero_point.float().unsqueeze(-1)
    grid = (codes.float().unflatten(1, (groups, -1)) - zero) * after.weight_scale.unsqueeze(-1)
    torch.testing.assert_close(after.weight, grid.flatten(1))


@pytest.mark.parametrize("options", OPTIONS[:5], ids=str)
def test_rounding_is_to_the_nearest(options, layer, x):
    before, after = layer(RoundToNearest(**options), x)
    step = after.weight_scale.repeat_interleave(64 // after.weight_scale.shape[1], 1)
    # Half a step; the grid's ends and rounded zero points cost up to one more half.
    assert bool(((after.weight - before).abs() <= 1.01 * step).all())
    assert float(((after.weight - before).abs() <= 0.501 * step).float().mean()) > 0.95


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("actorder", [True, False])
def test_gptq_beats_rounding(options, actorder, layer, x):
    before, rounded = layer(RoundToNearest(**options), x)
    _, solved = layer(GPTQ(**options, actorder=actorder), x)
    assert error(before, solved.weight, x) < error(before, rounded.weight, x)


def test_mse_observer_is_no_worse_in_its_own_measure(layer, x):
    before, minmax = layer(RoundToNearest(bits=3, group_size=16), x)
    _, mse = layer(RoundToNearest(bits=3, group_size=16, observer="mse"), x)

    def measure(after):
        return float((after.weight - before).abs().pow(2.4).sum())

    assert measure(mse) < measure(minmax)


def test_gptq_with_uncorrelated_inputs_is_rounding(layer):
    for actorder in (True, False):
        options = {"bits": 4, "group_size": 16}
        _, solved = layer(GPTQ(**options, actorder=actorder), torch.eye(64))
        _, rounded = layer(RoundToNearest(**options), torch.eye(64))
        torch.testing.assert_close(solved.weight, rounded.weight)


@pytest.mark.parametrize("block_size", [16, 32, 48, 128])
def test_block_size_changes_the_speed_only(block_size, layer, x):
    _, whole = layer(GPTQ(bits=4, group_size=16, block_size=64), x)
    _, parts = layer(GPTQ(bits=4, group_size=16, block_size=block_size), x)
    same = (whole.quantized_values() == parts.quantized_values()).float().mean()
    assert float(same) > 0.995  # sums in another order may tip a tie


@pytest.mark.parametrize("actorder", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_of_an_earlier_step_stay(actorder, symmetric, layer, x):
    def prune(linear):
        linear.weight.data[:, ::2] = 0
        linear.zeros = "2:4"

    method = GPTQ(bits=4, group_size=16, actorder=actorder, symmetric=symmetric)
    _, after = layer(method, x, prune)
    assert bool((after.weight[:, ::2] == 0).all()) and after.zeros == "2:4"
    assert float((after.weight[:, 1::2] != 0).float().mean()) > 0.5


def test_dead_features_and_singular_hessian(layer, x):
    x = x[:5].clone()
    x[:, 7] = 0
    before, after = layer(GPTQ(bits=4, group_size=16), x)
    _, rounded = layer(RoundToNearest(bits=4, group_size=16), x)
    assert torch.isfinite(after.weight).all()
    assert error(before, after.weight, x) < error(before, rounded.weight, x)
    # What no input reached is rounded like anything else: another text may reach it.
    step = after.weight_scale[:, 0]
    assert bool(((after.weight[:, 7] - before[:, 7]).abs() <= 1.01 * step).all())


def test_a_row_of_zeros(layer, x):
    def clear(linear):
        linear.weight.data[3] = 0

    for method in (RoundToNearest(group_size=16), GPTQ(group_size=16), W8A8()):
        _, after = layer(method, x, clear)
        assert bool((after.weight[3] == 0).all()) and torch.isfinite(after.weight).all()


def test_w8a8_is_close_to_dense(layer, x):
    before, after = layer(W8A8(), x)
    dense = x.unsqueeze(0) @ before.t()
    with torch.no_grad():
        rounded = after(x.unsqueeze(0))
    assert float((rounded - dense).norm() / dense.norm()) < 0.02
    assert not torch.equal(rounded, x.unsqueeze(0) @ after.weight.t())  # inputs are rounded, too


@pytest.mark.parametrize("method", ["rtn", "gptq", "w8a8"])
def test_quantised_twice_is_refused_live(method, tiny, tokens):
    options = {} if method == "w8a8" else {"group_size": 16}
    model = compress.apply(tiny("llama"), [{"method": "rtn", "group_size": 16}])
    with pytest.raises(compress.CompressError, match="quantised"):
        compress.apply(model, [{"method": method, **options}], tokens)


@pytest.mark.parametrize("options", [{"bits": 1}, {"bits": 9}, {"group_size": 0}])
def test_senseless_options(options, tiny):
    with pytest.raises(compress.CompressError):
        compress.apply(tiny("llama"), [{"method": "rtn", **options}])


def test_conv1d_is_rounded_along_its_inputs(tiny, tokens, helpers):
    model = tiny("gpt2")
    before = model.transformer.h[0].mlp.c_fc.weight.t().clone()
    compress.apply(model, [{"method": "rtn", "bits": 8, "group_size": 16}])
    module = model.transformer.h[0].mlp.c_fc
    assert module.weight.shape == before.shape == (64, 32)
    assert module.weight_scale.shape == (64, 2)
    assert helpers.difference(module.weight, before) < 0.01


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bert", "gpt_neox"])
def test_smoothing_is_folded_exactly_and_makes_inputs_even(family, tiny, tokens):
    """The scales are taken back where a norm has no other reader, and nowhere else."""
    model = tiny(family)
    with torch.no_grad():  # a channel in a hundred that is far larger, as in trained models
        for name, parameter in model.named_parameters():
            if "norm" in name.lower() or "ln_" in name:
                parameter[3::100] += 20
    step = {"method": "w8a8", "smoothing": 0.5}
    plain, smooth = copy.deepcopy(model), model
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
    compress.apply(plain, ["w8a8"])
    compress.apply(smooth, [step], tokens)
    with torch.no_grad():
        errors = [(m(input_ids=tokens).logits - expected).norm() for m in (plain, smooth)]
    if family in ("bert", "gpt_neox"):  # post-norm; attention and FFN in parallel, each has a norm
        assert errors[1] <= 1.01 * errors[0]
    else:
        assert errors[1] < 0.9 * errors[0]


def test_smoothing_needs_calibration(tiny):
    with pytest.raises(compress.CompressError, match="calibration"):
        compress.apply(tiny("llama"), [{"method": "w8a8", "smoothing": 0.5}])
    assert METHODS.get("w8a8").needs == "nothing"
