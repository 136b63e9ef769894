"""Mask ratios and masks: their laws, their exact counts, and what they leave alone."""

from __future__ import annotations

import math

import pytest
import torch

from compress.errors import CompressError
from compress.generators import MaskedGeneration, corrupt, mask_ratios, nested_masks

SPEC = MaskedGeneration(mask_id=99, vocabulary=90)
DRAWS = 4000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clean(rows: int = 6, length: int = 40) -> torch.Tensor:
    return torch.randint(0, 90, (rows, length), generator=generator(7))


@pytest.mark.parametrize(
    "prior, mean, low, high",
    [
        ("uniform", 0.5, 0.001, 1),
        ("arccos", 2 / math.pi, 0.001, 1),
        ("cosine", 2 / math.pi, 0.001, 1),
        ("linear", 0.5, 0.001, 1),
        ("pow:3", 0.75, 0.001, 1),
        ("beta", 0.8, 0.1, 1),
        ("beta:2,6", 0.25, 0.001, 1),
        ("truncated_normal", 0.6937, 0.5, 1),
        ("truncated_normal:0.5,0.1,0.2,0.8", 0.5, 0.2, 0.8),
    ],
)
def test_priors(prior, mean, low, high):
    for spread in (True, False):
        ratios = mask_ratios(DRAWS, prior, generator(), spread=spread)
        noise = 0.001 if spread else 4 * 0.31 / DRAWS**0.5
        assert float(ratios.mean()) == pytest.approx(mean, abs=noise + 5e-4)
        assert low - 1e-6 <= float(ratios.min()) and float(ratios.max()) <= high


def test_law_of_arccos_ratios():
    ratios = mask_ratios(DRAWS, "arccos", generator())
    for bound in (0.25, 0.5, 0.75):  # P(r <= b) = 1 - cos(pi b / 2)
        share = float((ratios <= bound).float().mean())
        assert share == pytest.approx(1 - math.cos(math.pi * bound / 2), abs=0.002)


def test_spread_draws_fill_every_stratum():
    for seed in range(5):
        ratios = mask_ratios(32, generator=generator(seed), shuffle=True)
        assert sorted((ratios * 32).floor().clamp(max=31).long().tolist()) == list(range(32))
    assert not torch.equal(ratios, ratios.sort().values)


def test_one_spread_draw_alone_is_uniform():
    firsts = torch.stack([mask_ratios(8, generator=generator(s))[0] for s in range(400)])
    assert float(firsts.mean()) == pytest.approx(0.5, abs=4 * 0.289 / 20)


@pytest.mark.parametrize("prior", ["unifrom", "beta:1", "beta:0.5,2", "truncated_normal:1,2,3,4"])
def test_unknown_priors_are_refused(prior):
    with pytest.raises(CompressError):
        mask_ratios(4, prior)


@pytest.mark.parametrize("ratio", [0.001, 0.15, 0.3, 0.5, 1.0])
def test_exact_masks(ratio):
    ids = clean()
    noisy, labels = corrupt(ids, SPEC, ratio, generator(), law="exact")
    hidden = labels != -100
    assert (hidden.sum(dim=1) == max(1, math.ceil(round(ratio * 40, 6)))).all()
    assert (noisy[hidden] == 99).all() and torch.equal(labels[hidden], ids[hidden])
    assert torch.equal(noisy[~hidden], ids[~hidden])


def test_bernoulli_masks():
    ids = clean(400, 50)
    ratios = torch.linspace(0.1, 1.0, 400)
    _, labels = corrupt(ids, SPEC, ratios, generator())
    hidden = (labels != -100).double()
    assert float(hidden.mean()) == pytest.approx(float(ratios.mean()), abs=4 * 0.5 / 20000**0.5)
    assert hidden[-1].all()  # ratio 1
    assert float(hidden.sum(dim=1).std()) > 5  # counts vary with the ratio and by chance


def test_the_weighting_decides_the_law():
    counts = {}
    for weighting in ("maskgit", "mdlm", "llada"):
        spec = SPEC.model_copy(update={"weighting": weighting})
        _, labels = corrupt(clean(100), spec, 0.5, generator())
        counts[weighting] = set((labels != -100).sum(dim=1).tolist())
    assert counts["maskgit"] == {20}
    assert len(counts["mdlm"]) > 3 and counts["llada"] == counts["mdlm"]


def test_conditions_prompts_and_special_tokens_stay(described):
    ids = torch.randint(0, 16, (50, 17), generator=generator())
    ids[:, 0] = 16 + torch.arange(50) % 10
    fixed = torch.zeros(17, dtype=torch.bool)
    fixed[1:5] = True
    noisy, labels = corrupt(ids, described, 1.0, generator(), fixed)
    assert torch.equal(noisy[:, :5], ids[:, :5]) and (noisy[:, 5:] == described.mask_id).all()
    assert (labels[:, :5] == -100).all()
    ids[:, 9] = described.class_id(None)  # a token that may not be produced
    assert torch.equal(corrupt(ids, described, 1.0, generator())[0][:, 9], ids[:, 9])


def test_rows_with_their_own_generators_do_not_depend_on_each_other():
    ids = clean(4)
    together = corrupt(ids, SPEC, 0.4, [generator(s) for s in range(4)])[0]
    alone = [corrupt(ids[i : i + 1], SPEC, 0.4, [generator(i)])[0] for i in range(4)]
    assert torch.equal(together, torch.cat(alone))


def test_nested_masks():
    free = torch.ones(5, 30, dtype=torch.bool)
    free[:, :4] = False
    ratios = torch.tensor([0.2, 0.5, 0.9]).expand(5, -1)
    masks = nested_masks(free, ratios, generator())
    assert masks.sum(dim=2).tolist() == [[6] * 5, [13] * 5, [24] * 5]
    assert (masks[0] <= masks[1]).all() and (masks[1] <= masks[2]).all()
    assert not masks[..., :4].any()


def test_refusals():
    ids = clean()
    for ratio in (0.0, 1.5, float("nan")):
        with pytest.raises(CompressError, match="mask ratios above 0"):
            corrupt(ids, SPEC, ratio)
    ids[2] = 95
    with pytest.raises(CompressError, match="row 2, whose tokens all stay visible"):
        corrupt(ids, SPEC, 0.5)
