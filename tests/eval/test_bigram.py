"""The bigram model that masked diffusion models are compared with."""

from __future__ import annotations

import math

import pytest
import torch

from compress.errors import CompressError
from compress.eval.bench.bigram import bigram_nll, bits_per_byte


def chain(transition: torch.Tensor, length: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = [0]
    for _ in range(length - 1):
        ids.append(int(torch.multinomial(transition[ids[-1]], 1, generator=generator)))
    return torch.tensor(ids)


@pytest.mark.parametrize("history", [0, 1, 4])
def test_probabilities_of_the_next_token_sum_to_one(history):
    train = torch.tensor([0, 1, 2, 0, 1, 3, 0, 2, 2, 1])  # token 4 never occurs
    chances = [math.exp(-bigram_nll(train, torch.tensor([history, n]), 5)) for n in range(5)]
    assert sum(chances) == pytest.approx(1.0, abs=1e-12) and min(chances) > 0


def test_it_comes_close_to_the_entropy_of_a_markov_chain():
    transition = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.2, 0.6], [0.5, 0.0, 0.5]])
    train, test = chain(transition, 4000, seed=0), chain(transition, 4000, seed=1)
    pairs = torch.stack([test[:-1], test[1:]])
    true = -float(transition[pairs[0], pairs[1]].log().mean())
    assert bigram_nll(train, test, 3) == pytest.approx(true, abs=0.01)


def test_by_hand():
    # Token 0 stood before 1 twice and before 2 once: (2 - d) / 3 + 2 d / 3 * P(1), where 1 follows
    # one kind of token of four bigram kinds in all (01, 10, 02, 20).
    train, d = torch.tensor([0, 1, 0, 1, 0, 2, 0]), 0.75
    backoff = (1 - d) / 4 + d * 3 / 4 / 3
    expected = -math.log((2 - d) / 3 + 2 * d / 3 * backoff)
    assert bigram_nll(train, torch.tensor([0, 1]), 3) == pytest.approx(expected)


def test_units_and_bad_input():
    assert bits_per_byte(math.log(2), 100, 50) == pytest.approx(2.0)
    with pytest.raises(CompressError, match="token ids from 0 to 2"):
        bigram_nll(torch.tensor([0, 3]), torch.tensor([0, 1]), 3)
    with pytest.raises(CompressError, match="at least two test tokens"):
        bigram_nll(torch.tensor([0, 1]), torch.tensor([0]), 3)
