"""Distributions over N:M masks: counts, limits, gradients, priors, the published toy problem."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from compress.linear.pattern import Pattern
from compress.methods.sparsity.maskllm import soft
from compress.methods.sparsity.maskllm.learning import (
    MaskSchedule,
    choices,
    choose,
    error_of_outputs,
    learn_on_block,
)
from compress.methods.sparsity.maskllm.masks import (
    Draw,
    MaskedLinear,
    hard_mask,
    initial_logits,
    linear_schedule,
    set_mode,
)
from compress.methods.sparsity.maskllm.search import local_search
from compress.methods.sparsity.maskllm.soft import Noise, candidates, gumbel, masked_weight
from compress.models.replay import BlockCall
from compress.system.activations import Activations
from compress.train.options import TrainingOptions
from compress.train.reconstruction import BestSeen, BlockWork, error_of_tokens

TWO_FOUR = Pattern(2, 4)
PATTERNS = [Pattern(1, 2), TWO_FOUR, Pattern(1, 4), Pattern(3, 8), Pattern(4, 8)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits_of(
    pattern: Pattern, groups: int, prior=None, alpha: float = 3.0, **more
) -> torch.Tensor:
    return initial_logits(
        pattern, groups, prior=prior, alpha=alpha, std=0.01, generator=generator(), **more
    )


def soft_mask(logits, pattern, kappa, tau, noise=None) -> torch.Tensor:
    """The relaxed mask alone, [G, M]."""
    ones = torch.ones(logits.shape[1], pattern.m)
    return masked_weight(ones, logits, pattern, kappa, tau, noise)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_candidates_are_all_legal_masks_once(pattern):
    masks = candidates(pattern)
    assert len(masks) == pattern.candidates
    assert bool((masks.sum(1) == pattern.n).all())
    assert len({tuple(m) for m in masks.tolist()}) == len(masks)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_soft_masks_sum_to_n_and_stay_in_the_unit_interval(pattern):
    logits = logits_of(pattern, 500)
    for kappa, tau in ((100.0, 4.0), (300.0, 0.5), (500.0, 0.05)):
        mask = soft_mask(logits, pattern, kappa, tau, gumbel(tuple(logits.shape), generator(1)))
        assert mask.shape == (500, pattern.m)
        assert float((mask.sum(1) - pattern.n).abs().max()) < 1e-5 * pattern.m
        assert float(mask.min()) >= 0 and float(mask.max()) <= 1 + 1e-6


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_hard_masks_keep_exactly_n(pattern):
    assert bool((hard_mask(logits_of(pattern, 300), pattern).sum(1) == pattern.n).all())


def test_cold_soft_masks_are_hard_masks():
    logits = logits_of(TWO_FOUR, 400)
    cold = soft_mask(logits, TWO_FOUR, kappa=1e6, tau=0.01, noise=None)
    assert torch.allclose(cold, hard_mask(logits, TWO_FOUR).float(), atol=1e-4)


def test_gradients_equal_those_of_the_composed_operations():
    logits = logits_of(TWO_FOUR, 50).requires_grad_()
    noise = gumbel(tuple(logits.shape), generator(2))
    weights = torch.randn(50, 4, generator=generator(3))
    (soft_mask(logits, TWO_FOUR, 120.0, 1.5, noise.clone()) * weights).sum().backward()
    other = logits.detach().clone().requires_grad_()
    share = torch.softmax((120.0 * other + noise) / 1.5, 0)
    ((share.t() @ candidates(TWO_FOUR)) * weights).sum().backward()
    assert torch.allclose(logits.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_gumbel_noise_chooses_by_softmax():
    logits = torch.tensor([0.5, -1.0, 0.0, 1.0, 0.2, -0.3])[:, None].expand(6, 60_000)
    chosen = (logits + gumbel((6, 60_000), generator())).argmax(0)
    share = torch.bincount(chosen, minlength=6) / 60_000
    assert torch.allclose(share, torch.softmax(logits[:, 0], 0), atol=0.01)


def test_strength_of_the_prior():
    weight = torch.randn(200, 80, generator=generator(4))
    prior = TWO_FOUR.mask(weight.abs())
    kept = {}
    for alpha in (0.0, 1.0, 2.0, 3.0, 6.0):
        start = hard_mask(logits_of(TWO_FOUR, 4000, prior, alpha), TWO_FOUR)
        kept[alpha] = float((start == prior.reshape(-1, 4)).all(1).float().mean())
    assert kept[6.0] >= 0.999
    # Simulated shares of groups that start with the prior's mask.
    for alpha, share in ((3.0, 0.945), (2.0, 0.79), (1.0, 0.49), (0.0, 1 / 6)):
        assert kept[alpha] == pytest.approx(share, abs=0.03)


def test_an_exact_prior_survives_any_noise():
    prior = TWO_FOUR.mask(torch.randn(100, 40, generator=generator(5)))
    for alpha in (0.0, 1.0, 3.0):
        start = hard_mask(logits_of(TWO_FOUR, 1000, prior, alpha, exact=True), TWO_FOUR)
        assert torch.equal(start.reshape(100, 40), prior)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_groups_run_along_the_input_whatever_the_storage(kind):
    inner = kind(8, 16) if kind is nn.Linear else Conv1D(16, 8)
    linear = MaskedLinear(inner, TWO_FOUR, logits_of(TWO_FOUR, 32))
    dense = linear.dense.clone()
    set_mode({"": linear}, "hard")
    x = torch.randn(5, 8, generator=generator(6))
    expected = functional.linear(x, dense * linear.mask(), inner.bias)
    assert torch.allclose(linear(x), expected)
    assert torch.allclose(linear.settle()(x), expected, atol=1e-6)
    counts = (linear.dense != 0).reshape(16, 2, 4).sum(-1)
    assert bool((counts == 2).all())


def test_modes_of_a_masked_linear():
    inner = nn.Linear(16, 8)
    linear = MaskedLinear(inner, TWO_FOUR, logits_of(TWO_FOUR, 32), stream=7)
    x = torch.randn(3, 16, generator=generator(8))
    before = inner.weight.detach().clone()
    set_mode({"": linear}, "dense")
    assert torch.equal(linear(x), functional.linear(x, before, inner.bias))
    set_mode({"": linear}, "hard")
    assert torch.equal(linear(x), linear(x))
    set_mode({"": linear}, Draw(100.0, 2.0, seed=1))
    first, again = linear(x), linear(x)
    assert torch.equal(first, again)  # a recomputed forward draws the same noise
    set_mode({"": linear}, Draw(100.0, 2.0, seed=2))
    assert not torch.equal(first, linear(x))
    linear(x).sum().backward()
    assert float(linear.logits.grad.abs().sum()) > 0 and inner.weight.grad is None
    assert torch.equal(inner.weight, before)
    assert linear.settle(dense=True) is inner and torch.equal(inner.weight, before)


def toy() -> tuple[torch.Tensor, torch.Tensor]:
    """A 32 x 32 linear and correlated Gaussian inputs."""
    weight = torch.randn(32, 32, generator=generator(10))
    mixing = torch.randn(32, 32, generator=generator(11)) / 32**0.5
    return weight, torch.randn(2048, 32, generator=generator(12)) @ mixing


def test_learned_masks_beat_one_shot_masks_on_the_toy_problem():
    weight, x = toy()
    target = x @ weight.t()

    def error(mask: torch.Tensor) -> float:
        return float((x @ (weight * mask).t() - target).square().mean())

    magnitude = error(TWO_FOUR.mask(weight.abs()))
    logits = logits_of(TWO_FOUR, 256, TWO_FOUR.mask(weight.abs() * x.square().mean(0).sqrt()))
    logits.requires_grad_()
    optimiser = torch.optim.AdamW([logits], lr=5e-4, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(300):
        kappa = linear_schedule((100.0, 500.0), step / 300)
        tau = linear_schedule((4.0, 0.05), step / 300)
        noise = gumbel(tuple(logits.shape), generator(step))
        mask = soft_mask(logits, TWO_FOUR, kappa, tau, noise).view(32, 32)
        loss = (x @ (weight * mask).t() - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert error(hard_mask(logits.detach(), TWO_FOUR).view(32, 32)) < 0.8 * magnitude


def test_local_search_never_loses_and_finds_the_best_of_small_rows():
    weight, x = toy()
    gram = x.t() @ x
    start = TWO_FOUR.mask(weight.abs())
    found = local_search(weight, gram, start, TWO_FOUR)
    assert bool((found.reshape(-1, 4).sum(1) == 2).all())

    def errors(mask: torch.Tensor, rows: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
        lost = rows * ~mask
        return ((lost @ metric) * lost).sum(1)

    assert bool((errors(found, weight, gram) <= errors(start, weight, gram) * (1 + 1e-5)).all())
    # One group a row: the search is exhaustive.
    small, inner = weight[:, :4], gram[:4, :4]
    best = local_search(small, inner, TWO_FOUR.mask(small.abs()), TWO_FOUR)
    every = torch.stack(
        [errors(m.bool().expand(32, 4), small, inner) for m in candidates(TWO_FOUR)]
    ).amin(0)
    assert torch.allclose(errors(best, small, inner), every, rtol=1e-4)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_weight_larger_than_the_pool_of_noise(pattern, monkeypatch):
    monkeypatch.setattr(soft, "_SPAN", {"cpu": 64 * pattern.candidates})
    soft._pool.cache_clear()
    groups = 640
    logits = logits_of(pattern, groups).requires_grad_()
    weight = torch.randn(groups, pattern.m, generator=generator(1))
    noise = Noise(seed=5, stream=3)
    drawn = masked_weight(weight, logits, pattern, 100.0, 2.0, noise)
    assert torch.equal(drawn, masked_weight(weight, logits, pattern, 100.0, 2.0, noise))
    other = masked_weight(weight, logits, pattern, 100.0, 2.0, Noise(seed=5, stream=4))
    assert not torch.equal(drawn, other)
    drawn.sum().backward()
    pieces = [noise.piece(n, pattern.candidates, 64, torch.device("cpu")) for n in range(10)]
    again = logits.detach().clone().requires_grad_()
    whole = masked_weight(weight, again, pattern, 100.0, 2.0, torch.cat(pieces, 1))
    whole.sum().backward()
    torch.testing.assert_close(drawn, whole)
    torch.testing.assert_close(logits.grad, again.grad)
    soft._pool.cache_clear()


def test_masks_are_drawn_in_float32_where_products_are_in_16_bits():
    weight = torch.randn(16, 32, generator=generator(1))
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        logits = logits_of(TWO_FOUR, 128).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            drawn = masked_weight(weight, logits, TWO_FOUR, 100.0, 2.0, Noise(0))
            assert drawn.dtype == dtype
            functional.linear(torch.ones(3, 32), drawn).float().sum().backward()
        found[dtype] = drawn.float(), logits.grad
    (exact, slopes), (rounded, others) = found.values()
    assert torch.equal(exact.bfloat16().float(), rounded)
    torch.testing.assert_close(others, slopes, rtol=2e-2, atol=1e-3)


def test_the_best_of_several_looks_is_kept():
    linear = MaskedLinear(nn.Linear(8, 4), TWO_FOUR, logits_of(TWO_FOUR, 8))
    linears, errors = {"": linear}, iter([3.0, 1.0, 2.0])
    best = BestSeen(lambda: next(errors), lambda: choices(linears), steps=8)
    best.before(0, 0)
    linear.logits.data.neg_()
    wanted = linear.mask()
    best.before(2, 1)  # another micro-batch of the same step
    best.before(2, 0)
    linear.logits.data.copy_(torch.randn(6, 8, generator=generator(3)))
    assert not torch.equal(linear.mask(), wanted)
    assert best.look() == 2.0 and (best.first, best.error) == (3.0, 1.0)
    choose(linears, best.state)
    assert torch.equal(linear.mask(), wanted)


def test_a_token_of_huge_norm_counts_as_much_as_all_others():
    target = torch.randn(1, 100, 8, generator=generator())
    target[:, 0] *= 1000
    lost, call = target.clone(), BlockCall()
    lost[:, 0] = 0
    assert float(error_of_tokens(lost, target, call)) == pytest.approx(0.01)
    assert float(error_of_outputs(lost, target, call)) == pytest.approx(0.505, abs=1e-3)
    rest = torch.zeros_like(target)
    rest[:, 0] = target[:, 0]
    assert float(error_of_outputs(rest, target, call)) == pytest.approx(0.495, abs=1e-3)
    assert float(error_of_outputs(torch.zeros_like(target), target, call)) == pytest.approx(1.0)
    # One too many, as long as the other, costs no more than the other's loss.
    made = target.clone()
    made[:, 1] = target[:, 0]
    assert float(error_of_outputs(made, target, call)) == pytest.approx(0.505, abs=1e-2)
    assert float(error_of_tokens(made, target, call)) > 1000
    padded = BlockCall(real=torch.arange(100)[None] > 0)  # the same without the first token
    assert float(error_of_outputs(lost, target, padded)) == 0.0


def test_masks_keep_what_makes_one_token_huge(tmp_path):
    # Three inputs carry every token but the first, whose only input, the fourth, makes it huge. To
    # drop the fourth is best for the mean over tokens, and it is where learning starts.
    def states(file, values):
        stored = Activations(tmp_path / file)
        for batch, value in enumerate(values):
            stored.write(batch, value)
        return stored

    inputs = torch.randn(4, 1, 64, 4, generator=generator())
    inputs[..., 3] = 0
    inputs[:, :, 0] = torch.tensor([0.0, 0.0, 0.0, 100.0])
    plain = nn.Linear(4, 8, bias=False)
    plain.weight.data = torch.randn(8, 4, generator=generator(1)).index_fill_(
        1, torch.tensor([3]), 1.0
    )
    targets = functional.linear(inputs, plain.weight.detach())
    start = torch.tensor([True, True, False, False]).expand(8, 4)
    block = nn.Sequential(MaskedLinear(plain, TWO_FOUR, logits_of(TWO_FOUR, 8, prior=start)))
    work = BlockWork(
        [block], [], states("inputs", inputs), states("targets", targets), [[BlockCall()] * 4],
        torch.device("cpu"), seed=0, precision="float32",
    )  # fmt: skip
    options = TrainingOptions(steps=40, batch=1, learning_rate=0.02, clip=None)
    learn_on_block(work, MaskSchedule((100.0, 500.0), (4.0, 0.05), 0.0), options)
    assert bool(block[0].mask()[:, 3].all())
    assert work.metrics["masks.after"] < 0.5 < work.metrics["masks.before"]
