"""The three forms of the bound agree, the estimators are unbiased, ordered decoding is a law."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

from compress.errors import CompressError
from compress.eval.quality.denoising import hidden_nll, sequences
from compress.eval.quality.likelihood import draw_masks, likelihood_bound
from compress.eval.quality.masks import share_mask, stratified_counts, uniform_mask
from compress.eval.quality.ordered import exact_ordered_nll
from compress.eval.quality.recovery import divergence, recovery

MASK, VOCABULARY = 7, 7  # ids 0..6 may be produced
RULES = ("confidence", "left-to-right", "margin", "entropy")


@pytest.fixture(scope="module")
def denoise():
    torch.manual_seed(0)
    shape = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    model = BertForMaskedLM(BertConfig(vocab_size=8, max_position_embeddings=16, **shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)

    def logits(ids: Tensor) -> Tensor:
        with torch.no_grad():
            found = model(input_ids=ids).logits.float()
        found[..., MASK] = -torch.inf
        return found

    return logits


def text(rows: int = 1, length: int = 4, seed: int = 1) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def hidden_sums(denoise, tokens: Tensor) -> dict[frozenset, float]:
    """sum_{i in S} c_i(S) for every set S of hidden positions of one sequence."""
    found = {}
    for size in range(1, len(tokens) + 1):
        for chosen in itertools.combinations(range(len(tokens)), size):
            hidden = torch.zeros(1, len(tokens), dtype=torch.bool)
            hidden[0, list(chosen)] = True
            found[frozenset(chosen)] = (
                hidden_nll(denoise, tokens[None], hidden, MASK)[0].sum().item()
            )
    return found


def by_enumeration(denoise, tokens: Tensor) -> float:
    """(b): the mean over k of the mean over sets of size k of L/k times their sum."""
    n, sums = len(tokens), hidden_sums(denoise, tokens)
    return sum(
        n / k * sum(v for s, v in sums.items() if len(s) == k) / math.comb(n, k) / n
        for k in range(1, n + 1)
    )


def test_integral_k_uniform_and_any_order_are_equal(denoise) -> None:
    tokens = text()[0]
    n, sums = len(tokens), hidden_sums(denoise, tokens)
    # int_0^1 t^(k-1) (1-t)^(n-k) dt = (k-1)! (n-k)! / n!
    integral = sum(
        v * math.factorial(len(s) - 1) * math.factorial(n - len(s)) / math.factorial(n)
        for s, v in sums.items()
    )
    orders = list(itertools.permutations(range(n)))
    any_order = 0.0
    for order in orders:
        for i, position in enumerate(order):
            hidden = torch.zeros(1, n, dtype=torch.bool)
            hidden[0, list(order[i:])] = True
            any_order += hidden_nll(denoise, tokens[None], hidden, MASK)[0][0, position].item()
    uniform = by_enumeration(denoise, tokens)
    assert uniform == pytest.approx(integral, rel=1e-6)
    assert uniform == pytest.approx(any_order / len(orders), rel=1e-6)


@pytest.mark.parametrize("control", [True, False])
@pytest.mark.parametrize("estimator", ["k-uniform", "integral", "integral-spread"])
def test_estimators_are_unbiased(denoise, estimator: str, control: bool) -> None:
    tokens = text(3)
    exact = sum(by_enumeration(denoise, row) for row in tokens) / tokens.numel()
    values = torch.tensor(
        [
            likelihood_bound(
                denoise, sequences(tokens), MASK, draws=40, estimator=estimator, control=control,
                seed=seed, batch_size=200,
            ).nats
            for seed in range(25)
        ]
    )  # fmt: skip
    error = values.std().item() / len(values) ** 0.5
    assert abs(values.mean().item() - exact) < 4 * error
    assert error < 0.1 * exact  # or the line above says nothing


def test_k_uniform_has_the_smaller_variance(denoise) -> None:
    tokens = text(1, 4).expand(500, 4)
    spread = {
        estimator: torch.tensor(
            likelihood_bound(
                denoise,
                sequences(tokens),
                MASK,
                draws=1,
                estimator=estimator,
                control=False,
                batch_size=500,
            ).window_nll
        ).var()
        for estimator in ("k-uniform", "integral")
    }
    assert 4 * spread["k-uniform"] < spread["integral"]


def test_the_control_variate_takes_away_what_frequencies_explain() -> None:
    tokens = text(200, 6).pow(2) // 8  # 0..4, unevenly often
    shares = torch.bincount(tokens.flatten(), minlength=VOCABULARY).float() / tokens.numel()

    def denoise(ids: Tensor) -> Tensor:
        return shares.log().expand(*ids.shape, VOCABULARY)

    data = sequences(tokens)
    exact = -shares.log()[tokens].double().mean(dim=1)
    found = likelihood_bound(denoise, data, MASK, draws=1)
    assert found.control
    assert found.window_nll == pytest.approx(exact.tolist(), rel=1e-5)
    plain = likelihood_bound(denoise, data, MASK, draws=1, control=False)
    assert (torch.tensor(plain.window_nll) - exact).std() > 0.1


def test_a_model_with_constant_logits_is_exact_for_every_draw() -> None:
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(0))
    tokens = text(5, 6)

    def denoise(ids: Tensor) -> Tensor:
        return logits.expand(*ids.shape, VOCABULARY)

    # One token over and over: its cross entropy is that of every subset.
    data = sequences(torch.full((5, 6), 3))
    exact = -logits.log_softmax(-1)[3].item()
    for seed in range(5):
        found = likelihood_bound(denoise, data, MASK, draws=1, seed=seed)
        assert found.nats == pytest.approx(exact, rel=1e-6)
        assert found.nats_stderr == pytest.approx(0, abs=1e-9)
    for rule in RULES:
        ordered = exact_ordered_nll(denoise, sequences(tokens), MASK, rule)
        assert ordered.nats == pytest.approx(
            -logits.log_softmax(-1)[tokens].mean().item(), rel=1e-6
        )


@pytest.mark.parametrize("rule", RULES)
def test_the_ordered_law_sums_to_one(denoise, rule: str) -> None:
    every = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=3)))
    found = exact_ordered_nll(denoise, sequences(every), MASK, rule, batch_size=128)
    mass = sum(math.exp(-3 * nats) for nats in found.window_nll)
    assert mass == pytest.approx(1, abs=1e-6)
    assert found.evaluations == 3 * len(every)


def test_left_to_right_is_one_order_of_the_bound(denoise) -> None:
    tokens = text(1, 3)
    by_hand = 0.0
    for position in range(3):
        hidden = (torch.arange(3) >= position)[None]
        by_hand += hidden_nll(denoise, tokens, hidden, MASK)[0][0, position].item()
    found = exact_ordered_nll(denoise, sequences(tokens), MASK, "left-to-right")
    assert 3 * found.nats == pytest.approx(by_hand, rel=1e-9)


def test_a_prompt_is_never_hidden(denoise) -> None:
    tokens, fixed = text(4, 6), torch.tensor([True, True, False, False, False, False])
    seen = []

    def watched(ids: Tensor) -> Tensor:
        seen.append(ids)
        return denoise(ids)

    data = sequences(tokens, fixed=fixed)
    found = likelihood_bound(watched, data, MASK, draws=4)
    exact_ordered_nll(watched, data, MASK)
    recovery(watched, data, MASK)
    assert not any((ids[:, :2] == MASK).any() for ids in seen)
    assert found.tokens == 16 and found.window == 6 and found.evaluations == 16


def test_rows_of_different_lengths_are_scored_without_their_padding(denoise) -> None:
    tokens, sizes = text(3, 6), torch.tensor([6, 4, 4])
    data = sequences(tokens, sizes=sizes)
    changed = tokens.clone()
    changed[1:, 4:] = 0
    again = sequences(changed, sizes=sizes)
    for score in (likelihood_bound, exact_ordered_nll, recovery):
        assert score(denoise, data, MASK) == score(denoise, again, MASK)
    alone = exact_ordered_nll(denoise, sequences(tokens[1:2, :4]), MASK)
    assert exact_ordered_nll(denoise, data, MASK).window_nll[1] == pytest.approx(alone.nats)


def test_units(denoise) -> None:
    found = likelihood_bound(denoise, sequences(text(4, 6), bytes_per_token=2.0), MASK)
    assert found.bits_per_token == pytest.approx(found.nats / math.log(2))
    assert found.bits_per_byte == pytest.approx(found.bits_per_token * 24 / 48)
    assert found.perplexity == pytest.approx(math.exp(found.nats))
    assert sum(found.window_nll) / 4 == pytest.approx(found.nats)
    assert type(found).model_validate_json(found.model_dump_json()) == found


def test_the_batch_size_changes_nothing(denoise) -> None:
    data = sequences(text(5, 6))
    small, large = (likelihood_bound(denoise, data, MASK, batch_size=b) for b in (1, 64))
    assert small.nats == pytest.approx(large.nats, rel=1e-6)


def test_counts_are_uniform_and_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.full((600,), 5)
    counts = stratified_counts(lengths, 3, generator)
    assert torch.bincount(counts.flatten()).tolist() == [0, 360, 360, 360, 360, 360]
    assert torch.equal(
        stratified_counts(lengths[:7], 5, generator), torch.arange(1, 6).expand(7, 5)
    )


def test_masks_hide_what_they_are_asked_to() -> None:
    generator = torch.Generator().manual_seed(0)
    free = torch.ones(3000, 4, dtype=torch.bool)
    free[:, 0] = False
    hidden = uniform_mask(torch.full((3000,), 2), free, generator)
    assert (hidden.sum(1) == 2).all() and not hidden[:, 0].any()
    assert hidden.float().mean(0)[1:].tolist() == pytest.approx([2 / 3] * 3, abs=0.04)
    assert share_mask(0.01, free, generator).sum(1).unique().tolist() == [1]


def test_integral_masks_have_the_stated_ratio() -> None:
    data = sequences(torch.zeros(400, 50, dtype=torch.long))
    masks, weights = draw_masks(data, 1, "integral-spread", torch.Generator().manual_seed(0))
    share = masks.float().mean(1)
    assert (share - 1 / weights).abs().max() < 0.4
    assert share.mean().item() == pytest.approx(0.5, abs=0.02)


def test_recovery_and_divergence(denoise) -> None:
    data = sequences(text(6, 10))
    first = recovery(denoise, data, MASK, original=denoise)
    assert [r.positions for r in first] == [12, 30, 48]  # round(1.5) is 2: half to even
    assert [r.divergence for r in first] == [0.0] * 3
    assert first == recovery(denoise, data, MASK, original=denoise, batch_size=2)

    def flat(ids: Tensor) -> Tensor:
        found = torch.zeros(*ids.shape, 8)
        found[..., MASK] = -torch.inf
        return found

    other = recovery(flat, data, MASK, original=denoise)
    assert other[1].cross_entropy == pytest.approx(math.log(7))
    assert other[1].divergence > 0.01


def test_neighbouring_windows_widen_the_errors_of_recovery() -> None:
    # Of a text whose first half is easy: as independent windows, these would tell twice as much.
    def easy(ids: Tensor) -> Tensor:
        found = torch.zeros(*ids.shape, 8)
        found[..., 0] = 3.0
        found[..., MASK] = -torch.inf
        return found

    tokens = torch.zeros(40, 10, dtype=torch.long)
    tokens[20:] = 1
    found = recovery(easy, sequences(tokens), MASK, ratios=(0.5,))[0]
    assert found.degrees == 4
    independent = math.sqrt(0.25 / 39)
    assert found.accuracy == 0.5 and found.accuracy_stderr > 1.5 * independent


def test_divergence_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.9, 0.1, 0.0]])
    by_hand = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert divergence(p.log(), q.log()).item() == pytest.approx(by_hand)
    with pytest.raises(CompressError, match="same vocabulary"):
        divergence(p, q[:, :2])


def test_refusals(denoise) -> None:
    with pytest.raises(CompressError, match="all of whose labels are visible"):
        sequences(text(2, 4), fixed=torch.ones(4, dtype=torch.bool))
    with pytest.raises(CompressError, match=r"sequences, length"):
        sequences(text()[0])
    with pytest.raises(CompressError, match="never does"):
        likelihood_bound(denoise, sequences(torch.full((1, 4), MASK)), MASK)
    with pytest.raises(CompressError, match="at least one draw"):
        likelihood_bound(denoise, sequences(text()), MASK, draws=0)
    with pytest.raises(CompressError, match="Did you mean 'confidence'"):
        exact_ordered_nll(denoise, sequences(text()), MASK, "confidense")
    with pytest.raises(CompressError, match="mask ratios"):
        recovery(denoise, sequences(text()), MASK, ratios=(0.0,))
    with pytest.raises(CompressError, match="finite logits"):
        likelihood_bound(lambda ids: denoise(ids) * torch.nan, sequences(text()), MASK)
