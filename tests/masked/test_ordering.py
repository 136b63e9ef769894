"""Proposals and orders: the laws of single draws."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from compress.generators.ordering import gumbel, halton_ranks, highest, preference, propose

DRAWS = 20_000
ONE = torch.ones(1, dtype=torch.float64)


def uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(probabilities: list[float], top_k=None, top_p=None, temperature=1.0) -> torch.Tensor:
    """Shares of the tokens among many draws."""
    logits = torch.tensor(probabilities, dtype=torch.float64).log().expand(DRAWS, -1)
    tokens = propose(logits, uniform(DRAWS), ONE.expand(DRAWS) * temperature, top_k, top_p)
    return torch.bincount(tokens, minlength=len(probabilities)) / DRAWS


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [0.1, 0.2, 0.3, 0.4, 0]),
        ({"top_k": 2}, [0, 0, 3 / 7, 4 / 7, 0]),
        ({"top_p": 0.65}, [0, 0, 3 / 7, 4 / 7, 0]),
        ({"top_p": 0.35}, [0, 0, 0, 1, 0]),
        ({"temperature": 0.5}, [1 / 30, 4 / 30, 9 / 30, 16 / 30, 0]),
        ({"temperature": 0.0}, [0, 0, 0, 1, 0]),
    ],
)
def test_tokens_follow_their_probabilities(options, expected):
    shares = drawn([0.1, 0.2, 0.3, 0.4, 0.0], **options)
    for share, chance in zip(shares.tolist(), expected, strict=True):
        assert share == pytest.approx(chance, abs=4.5 * 0.5 / DRAWS**0.5)
        assert (share == 0) == (chance == 0)


def test_impossible_tokens_are_never_drawn():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf]], dtype=torch.float64).expand(4, -1)
    edges = torch.tensor([0.0, 1e-300, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert propose(logits, edges, ONE.expand(4), None, None).tolist() == [1] * 4


def test_gumbel_noise():
    noise = gumbel(uniform(DRAWS))
    assert float(noise.mean()) == pytest.approx(0.5772, abs=4 * 1.283 / DRAWS**0.5)
    assert torch.isfinite(gumbel(torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))).all()


def test_confidence_at_temperature_one_draws_without_replacement():
    """Chi-square of the kept pairs of four tokens against successive draws in proportion to p."""
    chances = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    log_probs = torch.stack([chances, 1 - chances], dim=1).log().repeat(DRAWS, 1)
    tokens = torch.zeros(len(log_probs), dtype=torch.long)
    ones = torch.ones(len(log_probs), dtype=torch.float64)
    scores = preference("confidence", log_probs, tokens, uniform(len(log_probs)), ones, ones)
    kept = highest(scores.view(DRAWS, 4), torch.full((DRAWS,), 2))
    codes = (kept.long() * torch.tensor([1, 2, 4, 8])).sum(dim=1)
    statistic = 0.0
    for a, b in itertools.combinations(range(4), 2):
        p, q = float(chances[a]), float(chances[b])
        expected = DRAWS * p * q * (1 / (1 - p) + 1 / (1 - q))
        observed = int((codes == 2**a + 2**b).sum())
        statistic += (observed - expected) ** 2 / expected
    assert statistic < 20.5  # the 0.999 quantile at 5 degrees of freedom


def test_other_orders():
    probabilities = torch.tensor([[0.5, 0.5, 0], [0.6, 0.3, 0.1], [0.7, 0.0, 0.3]]).double()
    log_probs, tokens = probabilities.log(), torch.tensor([0, 1, 2])
    noise, rank = uniform(3), torch.tensor([2, 0, 1])

    def scores(order: str) -> torch.Tensor:
        return preference(order, log_probs, tokens, noise, torch.full((3,), 5.0).double(), rank)

    assert torch.allclose(scores("margin"), torch.tensor([0.0, 0.3, 0.4]).double(), atol=1e-6)
    entropy = -(probabilities[1] * probabilities[1].log()).sum()
    assert float(scores("entropy")[1]) == pytest.approx(-float(entropy), rel=1e-6)
    assert float(scores("entropy")[0]) == pytest.approx(-math.log(2), rel=1e-6)
    assert torch.allclose(scores("low_confidence").exp(), torch.tensor([0.5, 0.3, 0.3]).double())
    assert torch.equal(scores("random"), noise)
    assert scores("halton").argsort(descending=True).tolist() == [1, 2, 0]


def test_ties_go_to_the_left():
    assert highest(torch.zeros(1, 5), torch.tensor([2])).tolist() == [[True, True] + [False] * 3]


@pytest.mark.parametrize("size", [(1, 1), (1, 8), (1, 37), (4, 4), (7, 7), (16, 16), (3, 8)])
def test_halton_visits_each_cell_once(size):
    ranks = halton_ranks(*size)
    assert sorted(ranks.tolist()) == list(range(size[0] * size[1]))


def test_halton_spreads():
    assert halton_ranks(1, 8).argsort().tolist() == [0, 4, 2, 6, 1, 5, 3, 7]
    first = halton_ranks(8, 8).argsort()[:16]
    quarters = torch.bincount(first // 8 // 4 * 2 + first % 8 // 4, minlength=4)
    assert quarters.min() >= 3  # of 4 in each quarter of the square
