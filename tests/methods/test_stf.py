"""Supports that learn: how they are chosen, what gradients reach, and what it gains."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import compress
from compress.conformance.models import TINY, build
from compress.errors import CompressError
from compress.linear.dense_sparse import DenseSparseLinear
from compress.methods.factorize.stf import STF
from compress.methods.factorize.stf_layers import LatentFactors, ProxyFactors
from compress.models.anatomy import anatomy_of
from compress.train.whole import ModelWork

PLAIN = {"method": "dense_sparse", "ratio": 0.5, "rounds": 2, "weighting": "plain"}
FEW = {"steps": 4, "batch": 2, "learning_rate": 1e-2, "precision": "float32"}


@pytest.fixture
def layer():
    """48 outputs of 32 inputs in two blocks, five of twenty atoms for each."""
    generator = torch.Generator().manual_seed(0)
    made = DenseSparseLinear(32, 48, blocks=2, rank=20, nonzeros=5)
    made.dictionary.weight.data = torch.randn(40, 16, generator=generator)
    made.values.weight.data = 0.1 * torch.randn(48, 10, generator=generator)
    order = torch.rand(48, 2, 20, generator=generator).argsort(2)[..., :5].sort(2).values
    made.indices = order.reshape(48, 10).to(torch.uint8)
    return made


@pytest.mark.parametrize("kind", [LatentFactors, ProxyFactors])
def test_at_first_nothing_has_changed(layer, kind):
    before = layer.dense()
    factors = kind(layer)
    factors.choose()
    factors.follow()
    torch.testing.assert_close(factors.weight(), before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(factors.settle().dense(), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [LatentFactors, ProxyFactors])
def test_every_output_keeps_k_different_atoms_a_block(layer, kind):
    before = layer.indices.clone()
    factors = kind(layer)
    with torch.no_grad():
        for parameter in factors.learned():
            parameter += 0.05 * torch.randn_like(parameter)
    factors.choose()
    learned = factors.weight().detach()
    indices = factors.settle().indices.view(48, 2, 5).int()
    assert bool((indices.diff(dim=2) > 0).all()) and int(indices.max()) < 20
    assert not torch.equal(indices.view(48, 10), before.int())
    torch.testing.assert_close(layer.dense(), learned, rtol=1e-4, atol=1e-5)


def test_gradients_of_the_product_are_those_of_the_dense_matrix(layer):
    factors, inputs = ProxyFactors(layer), torch.randn(7, 32)
    weight = factors.weight().detach().requires_grad_()
    torch.nn.functional.linear(inputs, weight, layer.bias).square().sum().backward()
    factors(inputs).square().sum().backward()
    assert torch.equal(factors.proxy.grad, weight.grad)


def test_gradients_reach_what_is_off_the_support(layer):
    factors = LatentFactors(layer)
    factors.choose()
    upstream = torch.randn(48, 32)
    (factors.weight() * upstream).sum().backward()
    pieces = upstream.view(48, 2, 16).transpose(0, 1)
    torch.testing.assert_close(factors.latent.grad, pieces @ factors.atoms.transpose(1, 2))
    torch.testing.assert_close(
        factors.atoms.grad, (factors.latent * factors.support).transpose(1, 2) @ pieces
    )


def test_settled_supports_stay_and_what_is_off_them_gets_no_gradient(layer):
    factors = LatentFactors(layer)
    factors.free, before = False, factors.support.clone()
    with torch.no_grad():
        factors.latent += torch.randn_like(factors.latent)
    factors.choose()
    factors.weight().square().sum().backward()
    assert torch.equal(factors.support, before)
    assert torch.equal(factors.latent.grad != 0, before)


def test_a_choice_of_the_proxy_comes_nearer_to_it(layer):
    factors = ProxyFactors(layer)
    torch.nn.init.normal_(factors.proxy, generator=torch.Generator().manual_seed(1))
    errors = []
    for _ in range(4):
        factors.choose()
        errors.append(float((factors.weight() - factors.proxy).detach().norm()))
        factors.follow()
        errors.append(float((factors.weight() - factors.proxy).detach().norm()))
    assert errors == sorted(errors, reverse=True)


@pytest.fixture(scope="module")
def started():
    """A tiny llama with dense-sparse layers, and windows to learn."""
    model = build("llama")
    shape, generator = (8, 24), torch.Generator().manual_seed(2)
    ids = torch.randint(3, 40, shape, generator=generator)
    compress.apply(model, [{**PLAIN, "ratio": 0.3}], ids[:1])
    return model, ids


def learned(started, folder=None, guard=lambda: None, **options):
    """The model after learning, and what was noted of it."""
    model = copy.deepcopy(started[0]).requires_grad_(False)
    batches = [{"input_ids": part} for part in started[1].split(2)]
    step = STF(**options)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, DenseSparseLinear):
            kind = LatentFactors if step.mode == "latent" else ProxyFactors
            model.set_submodule(path, kind(layer))
    work = ModelWork(
        model, anatomy_of(model), batches, torch.device("cpu"), folder, seed=0, guard=guard
    )
    step.learn(work)
    return model, work.metrics


def tables(model):
    return {n: t for n, t in model.state_dict().items() if n.endswith((".weight", ".indices"))}


@pytest.mark.parametrize("mode", ["latent", "proxy"])
def test_interrupted_between_two_choices_it_ends_in_the_same_bytes(mode, started, tmp_path):
    options = {
        "mode": mode, "every": 3, "settled": 0.3,
        "training": {**FEW, "steps": 7, "checkpoint_every": 1},
        "tuning": {**FEW, "steps": 2, "checkpoint_every": 1},
    }  # fmt: skip
    calls = 0

    def guard():
        nonlocal calls
        calls += 1
        if calls in (6, 10):  # amidst the supports' training, and the values'
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            learned(started, tmp_path, guard, **options)
    again, whole = learned(started, tmp_path, **options)[0], learned(started, **options)[0]
    expected = tables(whole)
    assert all(torch.equal(t, expected[n]) for n, t in tables(again).items())
    assert any(
        not torch.equal(t, expected[n]) for n, t in tables(started[0]).items() if "indices" in n
    )


@pytest.mark.parametrize("kind", [LatentFactors, ProxyFactors])
def test_with_supports_that_learn_the_loss_falls_lower(layer, kind):
    """From the same start in as many steps, at a map of other atoms. At last the supports stay: of
    latent coefficients in the same training, of a proxy in one of its factors."""
    inputs = torch.randn(256, 32, generator=torch.Generator().manual_seed(5))
    other = copy.deepcopy(layer)
    other.indices = 19 - layer.indices
    wanted = inputs @ (other.dense() + 0.1).t()

    def learn(module, parameters, steps, prepare=lambda _step: None):
        optimiser = torch.optim.Adam(parameters, lr=1e-2)
        for step in steps:
            optimiser.param_groups[0]["lr"] = 1e-2 * (1 - step / 150)
            prepare(step)
            loss = (module(inputs) - wanted).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return float(loss.detach())

    def values_after(factors, start):
        made = factors.settle().requires_grad_(True)
        return learn(made, [made.dictionary.weight, made.values.weight], range(start, 150))

    def prepare(step):
        factors.free = step < 100
        factors.follow() if step % 5 else factors.choose()

    fixed = values_after(kind(copy.deepcopy(layer)), 0)
    factors = kind(layer)
    found = learn(factors, factors.learned(), range(150 if kind is LatentFactors else 100), prepare)
    if kind is ProxyFactors:
        found = values_after(factors, 100)
    assert found < 0.9 * fixed


def test_what_is_noted_of_a_learning(started):
    metrics = learned(started, every=1, training=FEW, tuning=FEW)[1]
    assert metrics["stf.changed"] > 0
    for name in ("stf", "tuning"):
        seconds, losses = zip(*metrics[f"{name}.curve"], strict=True)
        assert list(seconds) == sorted(seconds) and losses[-1] == metrics[f"{name}.loss"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_classifier_learns_from_labels_and_teacher(precision):
    torch.manual_seed(0)
    config = BertConfig(**{**TINY["bert"][1], "num_labels": 2})
    model = BertForSequenceClassification(config)
    model.config.architectures = ["BertForSequenceClassification"]
    generator = torch.Generator().manual_seed(1)
    examples = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 1] % 2}
        for ids in torch.randint(8, 200, (8, 12), generator=generator).split(2)
    ]
    head = model.classifier.weight.clone()
    training = {**FEW, "precision": precision}
    step = {"method": "stf", "training": training, "tuning": training, "distillation": {}}
    compress.apply(
        model, [{**PLAIN, "weighting": "fisher", "windows": 4}, step], examples, compute="float32"
    )
    assert torch.equal(model.classifier.weight, head)
    (loss,) = {bool(torch.isfinite(model(**batch).loss)) for batch in examples}
    assert loss


def test_only_dense_sparse_layers_in_floating_point_learn(tiny, tokens):
    step = {"method": "stf", "training": FEW, "tuning": None}
    with pytest.raises(CompressError, match="Put dense_sparse before it"):
        compress.apply(tiny("llama"), [step], tokens)
    rounded = {"method": "rtn", "bits": 8, "group_size": None}
    with pytest.raises(CompressError, match="Put stf before"):
        compress.apply(tiny("llama"), [PLAIN, rounded, step], tokens)
    averaged = {"steps": 1, "ema": 0.9}
    with pytest.raises(CompressError, match="have no average"):
        compress.apply(
            tiny("llama"), [{"method": "stf", "mode": "proxy", "training": averaged}], tokens
        )
    with pytest.raises(CompressError, match="without either nothing learns"):
        compress.apply(tiny("llama"), [PLAIN, {**step, "training": None}], tokens)


def test_without_norms_only_the_factors_learn(started):
    model = learned(started, training=FEW, tuning=None, norms=False)[0]
    before = dict(started[0].named_parameters())
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all(n.endswith((".dictionary.weight", ".values.weight")) for n in moved)
