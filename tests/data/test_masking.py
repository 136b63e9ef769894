"""Masked inputs: how many, where, and what the labels say."""

from __future__ import annotations

import pytest
import torch

from compress.errors import CompressError
from compress.generators.masking import IGNORE, mask_tokens

PAD, CLS, SEP, MASK = 0, 1, 2, 3
SPECIAL = [PAD, CLS, SEP, MASK]


def batch(rows: int = 40, length: int = 100) -> torch.Tensor:
    ids = torch.randint(4, 1000, (rows, length), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, -1] = CLS, SEP
    ids[0, 50:] = PAD
    return ids


def masked(ids: torch.Tensor, ratio: float = 0.15, seed: int = 0, **options):
    return mask_tokens(ids, MASK, SPECIAL, ratio, torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize("ratio", [0.01, 0.15, 0.5, 1.0])
def test_each_row_masks_the_same_share_of_what_may_be_masked(ratio):
    ids = batch()
    inputs, labels = masked(ids, ratio)
    eligible = ~torch.isin(ids, torch.tensor(SPECIAL))
    expected = (eligible.sum(1) * ratio).round().clamp(min=1).long()
    assert torch.equal((labels != IGNORE).sum(1), expected)
    assert not ((labels != IGNORE) & ~eligible).any()
    assert (inputs[labels != IGNORE] == MASK).all()
    assert torch.equal(inputs[labels == IGNORE], ids[labels == IGNORE])
    assert torch.equal(labels[labels != IGNORE], ids[labels != IGNORE])


def test_seed_decides_everything():
    ids = batch()
    for options in ({}, {"vocab_size": 1000}):
        first, again, other = (masked(ids, seed=seed, **options) for seed in (1, 1, 2))
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
        assert not torch.equal(first[1], other[1])


def test_eighty_ten_ten():
    ids = batch(400, 200)
    inputs, labels = masked(ids, 0.5, vocab_size=1000)
    chosen = labels != IGNORE
    share = lambda where: float((where & chosen).sum() / chosen.sum())  # noqa: E731
    assert share(inputs == MASK) == pytest.approx(0.8, abs=0.01)
    assert share(inputs == ids) == pytest.approx(0.1, abs=0.01)
    replaced = inputs[chosen & (inputs != MASK)]
    assert not torch.isin(replaced, torch.tensor(SPECIAL)).any() and replaced.max() < 1000
    assert torch.equal(inputs[~chosen], ids[~chosen])


@pytest.mark.parametrize("ratio", [0, -0.1, 1.1, float("nan")])
def test_ratio_out_of_range(ratio):
    with pytest.raises(CompressError, match="ratio"):
        masked(batch(), ratio)


def test_row_with_nothing_to_mask():
    ids = batch()
    ids[3] = PAD
    with pytest.raises(CompressError, match="row 3"):
        masked(ids)
