"""Divergences of a teacher's likeliest tokens, and predictions that are kept on the disk."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from compress.errors import CompressError
from compress.models.anatomy import anatomy_of
from compress.train import TokenSource, teacher_cache
from compress.train.divergence import divergence, top_divergence, top_shares
from compress.train.language import DistillationOptions, LanguageLoss
from compress.train.teacher import CachedTeacher, ModelTeacher
from compress.train.teacher_cache import CachedWindows

HEAT = 1.7


def pair(vocabulary: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(3 * torch.randn(6, vocabulary, generator=generator) for _ in range(2))


def test_all_tokens_but_one_give_the_whole_divergence_and_gradient():
    student, teacher = pair()
    results = []
    for count in (39, 1000, None):
        mine = student.clone().requires_grad_()
        if count is None:
            apart = divergence(mine, teacher, HEAT)
        else:
            apart = top_divergence(mine, *top_shares(teacher, count, HEAT), HEAT)
        apart.backward()
        results.append((float(apart.detach()), mine.grad))
    for value, gradient in results[:2]:
        assert value == pytest.approx(results[2][0], rel=1e-5)
        assert torch.allclose(gradient, results[2][1], atol=1e-5)


def test_more_tokens_tell_more_and_the_rest_counts_as_one():
    student, teacher = pair()
    values = [float(top_divergence(student, *top_shares(teacher, k, HEAT), HEAT))
              for k in (1, 4, 16, 39)]  # fmt: skip
    assert 0 < values[0] < values[1] < values[2] < values[3] + 1e-4
    tokens, shares = top_shares(teacher, 4, HEAT)
    assert torch.allclose(shares.exp().sum(-1), torch.ones(6))
    mine = functional.softmax(student / HEAT, -1)
    lumped = mine.gather(-1, tokens.long())
    lumped = torch.cat([lumped, 1 - lumped.sum(-1, keepdim=True)], -1)
    plain = (shares.exp() * (shares - lumped.log())).sum() * HEAT**2
    assert values[1] == pytest.approx(float(plain), rel=1e-4)


def test_a_teacher_without_a_doubt_and_16_bits_give_finite_values():
    sure = torch.full((2, 40), -200.0)
    sure[:, 3] = 200.0
    tokens, shares = top_shares(sure.bfloat16(), 4, 1.0)
    assert shares.dtype == torch.float32 and shares.isfinite().all()
    student = torch.zeros(2, 40, requires_grad=True)
    top_divergence(student, tokens, shares, 1.0).backward()
    assert student.grad.isfinite().all()


@pytest.fixture
def windows(tokens) -> TokenSource:
    mask = torch.ones_like(tokens)
    mask[2, 15:] = 0
    return TokenSource(tokens, attention=mask)


@pytest.fixture
def cache(windows, tiny, tmp_path, monkeypatch):
    """``cache(count)``: filled, the teacher, and a list with an entry for each time it is loaded"""
    monkeypatch.setattr(teacher_cache, "_LOGIT_BYTES", 4 * 264 * 7)  # seven positions at once
    model = tiny("llama")
    teacher, loaded = ModelTeacher(model, anatomy_of(model)), []

    def load() -> ModelTeacher:
        loaded.append(True)
        return teacher

    def make(count: int) -> tuple[CachedWindows, ModelTeacher, list[bool]]:
        source = CachedWindows(windows, tmp_path / "cache", count, HEAT)
        source.fill(load, torch.device("cpu"), torch.float32)
        return source, teacher, loaded

    return make


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_cached_teacher_teaches_what_the_live_one_does(precision, cache, tiny):
    source, teacher, _ = cache(263)
    student, options = tiny("llama", seed=1), DistillationOptions(labels=0.0, temperature=HEAT)
    batch = source.get(torch.tensor([2, 0]))
    losses = []
    for who in (teacher, CachedTeacher()):
        loss = LanguageLoss(student, anatomy_of(student), options, who)
        with torch.autocast("cpu", precision, precision != torch.float32):
            losses.append(loss(batch, loss.observe(batch))[0].detach())
    assert float(losses[1]) == pytest.approx(float(losses[0]), rel=0.02 if precision.itemsize < 4
                                             else 1e-5)  # fmt: skip


def test_a_cache_is_made_once_and_what_is_damaged_again(cache, tmp_path):
    source, _, loaded = cache(8)
    before = source.get(torch.tensor([5]))["teacher.shares"]
    cache(8)
    assert len(loaded) == 1
    path = tmp_path / "cache" / "window-000005.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-3] ^= 4
    path.write_bytes(damaged)
    with pytest.raises(CompressError, match="window-000005"):
        source.get(torch.tensor([5]))
    cache(8)
    assert len(loaded) == 2
    assert torch.equal(source.get(torch.tensor([5]))["teacher.shares"], before)
    cache(4)  # of other options
    assert len(loaded) == 3


def test_states_of_another_width_are_refused(tiny, tokens):
    student, teacher = tiny("llama", hidden_size=16, head_dim=8), tiny("llama")
    options = DistillationOptions(hidden=1.0)
    loss = LanguageLoss(
        student, anatomy_of(student), options, ModelTeacher(teacher, anatomy_of(teacher), {2: 2})
    )
    batch = {"input_ids": tokens}
    with torch.no_grad(), pytest.raises(CompressError, match="width"):
        loss(batch, loss.observe(batch))
