"""Losses: visible tokens do not count, and the weights make the bound."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.functional import cross_entropy

from compress.errors import CompressError
from compress.generators import masked_loss
from compress.train.generator import GeneratorLoss
from compress.train.language import DistillationOptions

NEVER = float("-inf")
CODES = 16  # of conftest: the first class token


def case(rows: int = 3, length: int = 6, vocabulary: int = 7):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, length, vocabulary, generator=generator)
    logits[..., -1] = NEVER
    labels = torch.randint(0, vocabulary - 1, (rows, length), generator=generator)
    hidden = torch.rand(rows, length, generator=generator) < 0.5
    hidden[:, 0] = True
    return logits, labels, hidden


@pytest.mark.parametrize("weighting", ["maskgit", "mdlm", "llada"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_visible_positions_do_not_count(weighting, smoothing):
    logits, labels, hidden = case()
    ratios = torch.tensor([0.3, 0.5, 0.9])
    seen = labels.masked_fill(~hidden, -100)
    loss = masked_loss(logits, seen, ratios, weighting, smoothing)
    changed = torch.where(hidden[..., None], logits, logits.flip(-1).roll(1, -1))
    changed[..., -1] = NEVER
    assert torch.equal(masked_loss(changed, seen, ratios, weighting, smoothing), loss)
    leaf = logits.clone().requires_grad_()
    masked_loss(leaf, seen, ratios, weighting, smoothing).backward()
    assert torch.isfinite(leaf.grad).all() and (leaf.grad[~hidden] == 0).all()
    assert (leaf.grad[hidden].abs().sum(-1) > 0).all()


def test_everything_masked_is_the_unconditional_cross_entropy():
    logits, labels, _ = case()
    plain = cross_entropy(logits.flatten(0, 1), labels.flatten())
    for weighting in ("maskgit", "mdlm", "llada"):
        loss = masked_loss(logits, labels, torch.ones(3), weighting)
        assert float(loss) == pytest.approx(float(plain), rel=1e-6)


def test_smoothing_spreads_over_legal_tokens():
    logits, labels, _ = case()
    loss = masked_loss(logits, labels, torch.ones(3), "maskgit", 0.2)
    legal = logits[..., :-1].flatten(0, 1)
    plain = cross_entropy(legal, labels.flatten(), label_smoothing=0.2)
    assert float(loss) == pytest.approx(float(plain), rel=1e-6)


@pytest.mark.parametrize("weighting", ["mdlm", "llada"])
def test_the_weight_makes_the_expectation_the_sum_of_all_positions(weighting):
    logits, labels, _ = case(rows=1, length=4)
    total, ratio = 0.0, 0.3
    for pattern in itertools.product((False, True), repeat=4):
        hidden = torch.tensor([pattern])
        chance = ratio ** sum(pattern) * (1 - ratio) ** (4 - sum(pattern))
        seen = labels.masked_fill(~hidden, -100)
        loss = masked_loss(logits, seen, torch.tensor([ratio]), weighting)
        assert torch.isfinite(loss)  # without a mask the loss is zero
        total += chance * float(loss)
    plain = cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert total == pytest.approx(float(plain), rel=1e-5)


def test_lengths():
    logits, labels, hidden = case(rows=2)
    seen = labels.masked_fill(~hidden, -100)
    lengths, ratios = torch.tensor([6, 3]), torch.tensor([0.5, 0.25])
    sums = torch.stack([
        cross_entropy(a, b, ignore_index=-100, reduction="sum") / r
        for a, b, r in zip(logits, seen, ratios, strict=True)
    ])  # fmt: skip
    mdlm = masked_loss(logits, seen, ratios, "mdlm", lengths=lengths)
    llada = masked_loss(logits, seen, ratios, "llada", lengths=lengths)
    assert float(mdlm) == pytest.approx(float(sums.sum() / 9), rel=1e-6)
    assert float(llada) == pytest.approx(float((sums / lengths).mean()), rel=1e-6)


def test_a_mean_over_nothing_is_refused():
    logits, labels, _ = case()
    with pytest.raises(CompressError, match="labels that are all visible"):
        masked_loss(logits, torch.full_like(labels, -100), torch.ones(3), "maskgit")


def test_a_batch_in_which_nothing_was_masked_costs_nothing(images):
    """A bound masks each token by chance, in a single row now and then none."""
    model = images(weighting="mdlm").model
    loss = GeneratorLoss(model, DistillationOptions())
    ids = torch.zeros(1, 17, dtype=torch.long)
    ids[:, 0] = CODES  # a class
    batch = {"input_ids": ids, "labels": torch.full_like(ids, -100)}
    batch |= {"ratios": torch.tensor([0.01]), "lengths": torch.tensor([16])}
    total, figures = loss(batch, loss.observe(batch))
    total.backward()
    assert float(total) == 0 and figures == {"masked_loss": 0, "kl": 0}
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
