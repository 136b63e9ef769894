"""Magnitude, Wanda, SparseGPT: exact counts, known special cases, the order of their errors."""

from __future__ import annotations

import pytest
import torch

import compress
from compress.linear.algebra import inverse_cholesky
from compress.linear.statistics import GRAM, MOMENTS, InputStatistics
from compress.linear.sweep import sweep
from compress.methods.sparsity.magnitude import Magnitude
from compress.methods.sparsity.sparsegpt import SparseGPT
from compress.methods.sparsity.wanda import Wanda
from compress.methods.work import SiteWork
from compress.models.anatomy import anatomy_of

METHODS = (Magnitude, Wanda, SparseGPT)


@pytest.fixture
def layer(tiny):
    """``layer(method, inputs)``: the weight [32, 64] of a down projection before and after."""

    def solve(method, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        model = tiny("llama")
        anatomy = anatomy_of(model).blocks[0]
        block, site = model.get_submodule(anatomy.path), anatomy.site("down")
        statistics = InputStatistics(inputs.shape[-1], GRAM)
        if method.statistic(site) == MOMENTS:
            statistics = InputStatistics(inputs.shape[-1], MOMENTS)
        statistics.update(inputs)
        (name,) = site.linears
        work = SiteWork(block, anatomy, site, (name,), {name: statistics})
        before = work.weight(name).clone()
        with torch.no_grad():
            method.solve(work)
        return before, work.weight(name)

    return solve


def inputs(rows: int = 400, width: int = 64, seed: int = 0) -> torch.Tensor:
    """Correlated features of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    scales = torch.rand(width, generator=generator) * 3 + 0.1
    return torch.randn(rows, width, generator=generator) @ mixing * scales


def error(before: torch.Tensor, after: torch.Tensor, x: torch.Tensor) -> float:
    return float((x @ (before - after).t()).square().sum())


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "1:4", "4:8", "3:8", "16:32"])
@pytest.mark.parametrize("method", METHODS)
def test_exactly_n_of_m(method, pattern, layer):
    _, after = layer(method(pattern=pattern), inputs())
    kept, group = map(int, pattern.split(":"))
    counts = (after != 0).reshape(after.shape[0], -1, group).sum(-1)
    assert bool((counts == kept).all())


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.77])
@pytest.mark.parametrize("method", METHODS)
def test_exact_number_of_zeros(method, sparsity, layer):
    _, after = layer(method(sparsity=sparsity), inputs())
    zeros = after == 0
    if method is Wanda:  # a row at a time
        assert zeros.sum(1).unique().tolist() == [int(sparsity * 64)]
    else:  # over the matrix (SparseGPT: over a block of columns, here the whole matrix)
        assert int(zeros.sum()) == int(sparsity * 32 * 64)


def test_magnitude_keeps_the_largest(layer):
    before, after = layer(Magnitude(sparsity=0.5), inputs())
    assert before[after == 0].abs().max() <= before[after != 0].abs().min()
    assert torch.equal(before[after != 0], after[after != 0])


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_wanda_with_equal_norms_is_magnitude(pattern, layer):
    signs = torch.randn(100, 64, generator=torch.Generator().manual_seed(1)).sign()
    _, wanda = layer(Wanda(pattern=pattern), signs)
    _, magnitude = layer(Magnitude(pattern=pattern), signs)
    assert torch.equal(wanda, magnitude)


def test_wanda_with_equal_norms_takes_the_smallest_of_each_row(layer):
    before, after = layer(Wanda(sparsity=0.25), torch.ones(5, 64))
    expected = before.clone().scatter_(1, before.abs().topk(16, 1, largest=False).indices, 0)
    assert torch.equal(after, expected)


def test_wanda_weighs_by_the_norm(layer):
    x = inputs()
    before, after = layer(Wanda(sparsity=0.5), x)
    score = before.abs() * x.norm(dim=0)
    for row in range(len(before)):
        gone = after[row] == 0
        assert score[row][gone].max() <= score[row][~gone].min()


def test_sparsegpt_with_the_identity_is_magnitude(layer):
    identity = torch.eye(64)
    for options in ({"pattern": "2:4"}, {"sparsity": 0.5}):
        _, updated = layer(SparseGPT(**options), identity)
        _, plain = layer(Magnitude(**options), identity)
        torch.testing.assert_close(updated, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"pattern": "2:4"}, {"pattern": "4:8"}, {"sparsity": 0.6}])
def test_order_of_errors(options, layer):
    x = inputs()
    before, updated = layer(SparseGPT(**options), x)
    same_mask = before * (updated != 0)
    assert error(before, updated, x) < error(before, same_mask, x)
    _, wanda = layer(Wanda(**options), x)
    _, magnitude = layer(Magnitude(**options), x)
    assert error(before, updated, x) < error(before, wanda, x) < error(before, magnitude, x)


def test_update_is_that_of_optimal_brain_surgeon(layer):
    """A row that loses w_q: w - w_q [H^-1]_q / [H^-1]_qq over the columns from q on."""
    x = inputs()
    before, after = layer(SparseGPT(pattern="31:32", damping=0.01), x)
    hessian = (x.t() @ x).double()
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    for row in range(len(before)):
        (q,) = (after[row, :32] == 0).nonzero().flatten().tolist()
        inverse = torch.linalg.inv(hessian[q:, q:])
        expected = before[row].double()
        expected[q:] -= expected[q].clone() * inverse[0] / inverse[0, 0]
        torch.testing.assert_close(after[row, :32].double(), expected[:32], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", [Wanda, SparseGPT])
def test_dead_features_go_first(method, layer):
    x = inputs()
    dead = [3, 4, 40]
    x[:, dead] = 0
    before, after = layer(method(pattern="2:4"), x)
    assert torch.isfinite(after).all()
    assert bool((after[:, dead] == 0).all())
    assert bool(((after != 0).reshape(32, -1, 4).sum(-1) == 2).all())
    _, idle = layer(method(sparsity=0.0), x)
    assert torch.equal(idle, before)


def test_singular_hessian_is_handled(layer):
    x = inputs(rows=5)  # rank 5 of 64
    before, after = layer(SparseGPT(pattern="2:4"), x)
    assert torch.isfinite(after).all()
    assert error(before, after, x) < error(before, before * (after != 0), x)


def test_nan_in_the_inputs_is_an_error(layer):
    x = inputs()
    x[0, 0] = float("nan")
    with pytest.raises(compress.CompressError, match="finite input statistics.*down_proj"):
        layer(SparseGPT(pattern="2:4"), x)


def test_targets(tiny, tokens):
    model = tiny("llama")
    before = {n: p.clone() for n, p in model.named_parameters()}
    step = {"method": "wanda", "include": ["*mlp*"], "exclude": ["re:layers\\.1\\..*gate"]}
    compress.apply(model, [step], tokens)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    linears = ("gate", "up", "down")
    names = {f"model.layers.{i}.mlp.{m}_proj.weight" for i in range(3) for m in linears}
    assert changed == names - {"model.layers.1.mlp.gate_proj.weight"}


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_embeddings_head_and_norms_stay(method, tiny, tokens):
    model = tiny("llama")
    before = {n: p.clone() for n, p in model.named_parameters() if "proj" not in n}
    compress.apply(model, [{"method": method}], tokens)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert len(before) == 9  # embeddings, head, two norms a block, the last one


@pytest.mark.parametrize("first", [{"pattern": "4:8"}, {"sparsity": 0.7}])
@pytest.mark.parametrize(
    "second",
    [
        {"method": "sparsegpt", "pattern": "2:4"},
        {"method": "sparsegpt", "sparsity": 0.5},
        {"method": "gptq", "bits": 4, "group_size": 16},
        {
            "method": "maskllm",
            "training": None,
            "tuning": {"steps": 2, "batch": 1, "precision": "float32"},
        },
        {"method": "maskllm", "training": None, "least_squares": True},
    ],
    ids=lambda step: "-".join(map(str, list(step.values())[:2])) + str("tuning" in step),
)
@pytest.mark.parametrize("noted", [True, False])
def test_zeros_stay_zeros(first, second, noted, tiny, tokens):
    model = compress.apply(tiny("llama"), [{"method": "magnitude", **first}])
    path = "model.layers.1.mlp.down_proj"
    zeros = model.get_submodule(path).weight == 0
    if not noted:  # a model that somebody else has pruned
        for module in model.modules():
            module.__dict__.pop("zeros", None)
    compress.apply(model, [second], tokens)
    after = model.get_submodule(path).weight
    assert bool((after[zeros] == 0).all())
    assert float((after != 0).float().mean()) > 0.2


@pytest.mark.parametrize("block_size", [8, 40, 128])
@pytest.mark.parametrize("together", [1, 4, 8])
def test_sweep_is_column_by_column(block_size, together):
    """Spreading errors by halves of blocks is what spreading each of them at once is."""
    torch.manual_seed(0)
    weight, x = torch.randn(5, 72), inputs(width=72)
    upper, _ = inverse_cholesky(x.t() @ x, 0.01)

    class Coarse:
        """Rounds to a step that the columns looked at together decide when the first comes."""

        def __init__(self) -> None:
            self.together = together

        def enter(self, start, stop, block, diagonal) -> None:
            self.start = start

        def column(self, index, value, block):
            if index % together == 0:
                first = index - self.start
                self.step = block[first : first + together].abs().amax(0) / 3
            return (value / self.step).round() * self.step

    plain, rule = weight.t().clone(), Coarse()
    rule.enter(0, 72, plain, upper.diagonal())
    for i in range(72):
        rounded = rule.column(i, plain[i], plain)
        error = (plain[i] - rounded) / upper[i, i]
        plain[i + 1 :] -= upper[i, i + 1 :, None] * error
        plain[i] = rounded
    swept = sweep(weight, upper, Coarse(), block_size)
    torch.testing.assert_close(swept, plain.t(), rtol=1e-4, atol=1e-4)
