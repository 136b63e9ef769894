"""Packed N:M masks: exact, and as small as they claim."""

from __future__ import annotations

import math

import pytest
import torch

from compress.checkpoint.mask_file import (
    PackedPattern,
    load_masks,
    nonzero_mask,
    pack_mask,
    save_masks,
    unpack_mask,
)
from compress.errors import CompressError

PATTERNS = ["2:4", "1:4", "1:2", "4:8", "2:8", "8:16", "3:7", "1:40"]


def random_mask(pattern, rows=5, groups=11):
    scores = torch.rand(rows, groups, pattern.m, generator=torch.Generator().manual_seed(0))
    kept = scores.topk(pattern.n, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, kept, True).flatten(1)


@pytest.mark.parametrize("text", PATTERNS)
def test_round_trip(text):
    pattern = PackedPattern.parse(text)
    mask = random_mask(pattern)
    words = pack_mask(mask, pattern)
    assert torch.equal(unpack_mask(words, pattern, tuple(mask.shape)), mask)
    entropy = math.log2(pattern.candidates) / pattern.m
    assert entropy <= pattern.bits_per_weight <= 2 * entropy
    assert words.nbytes * 8 <= mask.numel() * pattern.bits_per_weight + 64


def test_two_of_four_takes_two_thirds_of_a_bit():
    mask = random_mask(PackedPattern(2, 4), rows=64, groups=48)
    assert pack_mask(mask, PackedPattern(2, 4)).nbytes * 8 == mask.numel() * 2 / 3


def test_every_digit_of_a_byte():
    mask = torch.tensor([[1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 1, 0]]).bool()
    # 01 is candidate 0, 23 is candidate 5, 02 is candidate 1.
    assert pack_mask(mask, PackedPattern(2, 4)).tolist() == [0 + 5 * 6 + 1 * 36]


def test_file_holds_masks_of_several_patterns(tmp_path):
    masks = {text: random_mask(PackedPattern.parse(text)) for text in PATTERNS}
    layout = {t: (PackedPattern.parse(t), tuple(mask.shape)) for t, mask in masks.items()}
    path = save_masks(tmp_path, layout, reversed(masks.items()), base_digest="abc")
    loaded = dict(load_masks(path))
    assert loaded.keys() == masks.keys()
    assert all(torch.equal(loaded[t], masks[t]) for t in masks)


def test_mask_of_a_weight_with_zeros_of_its_own():
    weight = torch.tensor([[1.0, 0, 0, 2, 0, 0, 3, 0, 0, 0, 0, 0]])
    mask = nonzero_mask(weight, PackedPattern(2, 4))
    assert mask.view(-1, 4).sum(1).tolist() == [2, 2, 2]
    assert torch.equal(weight * mask, weight)
    with pytest.raises(CompressError, match="at most 2"):
        nonzero_mask(torch.ones(1, 4), PackedPattern(2, 4))


def test_what_is_no_mask_is_refused(tmp_path):
    pattern = PackedPattern(2, 4)
    with pytest.raises(CompressError, match="keep 2 of every 4"):
        pack_mask(torch.ones(1, 4).bool(), pattern)
    with pytest.raises(CompressError, match="4 divides"):
        pack_mask(torch.ones(1, 6).bool(), pattern)
    with pytest.raises(CompressError, match="out of range"):
        unpack_mask(torch.tensor([255], dtype=torch.uint8), pattern, (1, 12))
    with pytest.raises(CompressError, match="2 words"):
        unpack_mask(torch.tensor([1], dtype=torch.uint8), pattern, (1, 24))
    with pytest.raises(CompressError, match="0 < N < M"):
        PackedPattern.parse("4:4")
    (tmp_path / "masks.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CompressError, match="readable mask file"):
        list(load_masks(tmp_path / "masks.safetensors"))
