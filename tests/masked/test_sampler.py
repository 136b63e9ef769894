"""The sampler: counts, frozen tokens, determinism, laws of its variants, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from compress.errors import CompressError
from compress.generators import SamplerOptions, reveal_plan, sample

ORDERS = ("confidence", "low_confidence", "margin", "entropy", "random", "halton",
          "left_to_right", "ancestral")  # fmt: skip
COUNTED = ORDERS[:-1]


def masks_seen(denoiser) -> list[int]:
    """Masks of the first row at each evaluation."""
    return [int((ids[0] == denoiser.spec.mask_id).sum()) for ids in denoiser.seen]


@pytest.mark.parametrize("order", COUNTED)
@pytest.mark.parametrize("steps", [1, 3, 8, 16])
def test_masks_left_follow_the_plan(images, order, steps):
    denoiser = images()
    options = SamplerOptions(order=order, steps=steps)
    result = sample(denoiser, options, classes=[3, 4])
    plan = [left for _, left in reveal_plan(16, steps, options.schedule_of(denoiser.spec))]
    assert [*masks_seen(denoiser)[1:], 0] == plan and result.counters.calls == steps


@pytest.mark.parametrize("order", ORDERS)
def test_known_tokens_stay_and_new_ones_are_legal(images, text, order):
    options = SamplerOptions(order=order, steps=4)
    pictures = sample(images(), options, classes=[1, None, 9])
    assert pictures.tokens[:, 0].tolist() == [17, 26, 25] and pictures.generated.shape == (3, 16)
    assert pictures.generated.min() >= 0 and pictures.generated.max() < 16
    denoiser = text()
    mask = denoiser.spec.mask_id
    rows = torch.randint(10, 200, (5, 20), generator=torch.Generator().manual_seed(2))
    holes = torch.rand(5, 20, generator=torch.Generator().manual_seed(3)) < 0.6
    filled = sample(denoiser, options, rows=rows.masked_fill(holes, mask))
    assert torch.equal(filled.tokens[~holes], rows[~holes]) and torch.equal(filled.filled, holes)
    assert denoiser.spec.legal(264)[filled.tokens[holes]].all()
    prompted = sample(denoiser, options, prompts=[[20, 21, 22], [30, 31, 32]], length=8)
    assert prompted.tokens[:, :3].tolist() == [[20, 21, 22], [30, 31, 32]]


def test_prefix_and_suffix_frame_each_sequence(text):
    denoiser = text()
    spec = denoiser.spec.model_copy(update={"prefix": (4,), "suffix": (5,)})
    denoiser.spec = spec
    result = sample(denoiser, SamplerOptions(steps=2), prompts=[[20, 21]], length=6)
    assert result.tokens[0, :3].tolist() == [4, 20, 21] and int(result.tokens[0, -1]) == 5
    assert result.filled[0].tolist() == [False] * 3 + [True] * 6 + [False]


@pytest.mark.parametrize("order", ORDERS)
def test_rows_do_not_depend_on_the_batch(images, order):
    options = SamplerOptions(order=order, steps=6, guidance=1.0)
    classes = [0, 1, 2, 3, None]
    whole = sample(images(), options, classes=classes, seeds=5)
    single = sample(images(), options, classes=classes, seeds=5, batch=1)
    assert torch.equal(whole.tokens, single.tokens)
    own = sample(images(), options, classes=[4] * 3, seeds=[11, 12, 13])
    turned = sample(images(), options, classes=[4] * 3, seeds=[13, 11, 12], batch=2)
    assert torch.equal(own.tokens[[2, 0, 1]], turned.tokens)
    assert not torch.equal(own.tokens[0], own.tokens[1])


@pytest.mark.parametrize("order", COUNTED)
def test_seeds_decide_everything(images, order):
    options = SamplerOptions(order=order, steps=5)
    first, again, other = (sample(images(), options, count=4, seeds=s).tokens for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_without_temperatures_nothing_is_random(images):
    options = SamplerOptions(steps=5, temperature=0, order_temperature=0)
    tokens = sample(images(), options, classes=[2] * 4).tokens
    assert (tokens == tokens[0]).all()


def test_a_step_a_token_is_greedy_decoding_in_any_order(images):
    denoiser = images()
    options = SamplerOptions(steps=16, temperature=0, order_temperature=0)
    result = sample(denoiser, options, classes=[2])
    ids = torch.full((1, 17), denoiser.spec.mask_id)
    ids[0, 0] = 18
    for _ in range(16):
        best = denoiser.logits(ids).double().softmax(-1).max(-1)
        place = best.values.masked_fill(ids != denoiser.spec.mask_id, -1).argmax()
        ids[0, place] = best.indices[0, place]
    assert torch.equal(result.tokens, ids)


def test_one_step_draws_from_the_marginals(images):
    denoiser = images()
    start = torch.full((1, 17), denoiser.spec.mask_id)
    start[0, 0] = 18
    greedy = sample(denoiser, SamplerOptions(steps=1, temperature=0), classes=[2])
    logits = denoiser.logits(start)[0, 1:]
    assert torch.equal(greedy.generated[0], logits.argmax(-1))
    draws = 600
    one = {
        o: sample(denoiser, SamplerOptions(steps=1, order=o), classes=[2] * draws) for o in ORDERS
    }
    for order in ORDERS:  # one step leaves no order: all variants are the same independent draws
        assert torch.equal(one[order].tokens, one["confidence"].tokens)
    chances = logits.softmax(-1)
    shares = torch.nn.functional.one_hot(one["random"].generated, 16).float().mean(0)
    assert float((shares - chances[:, :16]).abs().max()) < 5 * 0.5 / math.sqrt(draws)


def test_ancestral_steps_reveal_the_expected_share(images):
    denoiser = images()
    rows, steps = 400, 4
    options = SamplerOptions(order="ancestral", steps=steps, cache=False)
    sample(denoiser, options, classes=[1] * rows, batch=rows)
    # Rows without masks are no longer evaluated: those that are missing have none.
    for step, ids in enumerate(denoiser.seen):
        masks = float((ids == denoiser.spec.mask_id).sum()) / rows
        share = 1 - step / steps
        assert masks == pytest.approx(16 * share, abs=4 * math.sqrt(16 * share / rows) + 1e-9)


def test_the_cache_changes_the_cost_only(images):
    results = {}
    for cache in (True, False):
        options = SamplerOptions(order="ancestral", steps=60, cache=cache)
        results[cache] = sample(images(), options, classes=[1, 2, 3], seeds=3, batch=1)
    assert torch.equal(results[True].tokens, results[False].tokens)
    assert results[True].counters.calls <= 3 * 16 < results[False].counters.calls


def test_blocks_are_filled_in_turn(text):
    denoiser = text()
    options = SamplerOptions(order="low_confidence", steps=8, block=4, temperature=0)
    sample(denoiser, options, prompts=[[20, 21]], length=16)
    mask = denoiser.spec.mask_id
    for step, ids in enumerate(denoiser.seen):
        hidden = (ids[0, 2:] == mask).view(4, 4).sum(dim=1).tolist()
        done = step // 2
        assert hidden == [0] * done + [4 - 2 * (step % 2)] + [4] * (3 - done)


def test_a_threshold_saves_steps_and_never_adds_any(images):
    plain = SamplerOptions(order="low_confidence", steps=16)
    eager = plain.model_copy(update={"threshold": 0.05})
    blocks = eager.model_copy(update={"block": 4})
    cost = [sample(images(), o, classes=[1]).counters.calls for o in (plain, eager, blocks)]
    assert cost[0] == 16 and cost[1] < 16 and cost[1] <= cost[2] < 16
    never = plain.model_copy(update={"threshold": 1 - 1e-9})
    first, second = (sample(images(), o, classes=[1]).tokens for o in (plain, never))
    assert torch.equal(first, second)


def test_halton_order_is_that_of_the_grid(images):
    from compress.generators.ordering import halton_ranks

    denoiser = images()
    sample(denoiser, SamplerOptions(order="halton", steps=16), classes=[0])
    order = []
    for before, after in zip(denoiser.seen, denoiser.seen[1:], strict=False):
        order.append(int((before != after).nonzero()[0, 1]) - 1)
    assert order == halton_ranks(4, 4).argsort().tolist()[:15]


def test_guidance(images):
    def tokens(**options) -> torch.Tensor:
        return sample(images(), SamplerOptions(steps=4, **options), classes=[1, 2, 3]).tokens

    assert not torch.equal(tokens(guidance=60.0), tokens())
    assert not torch.equal(tokens(guidance=60.0), tokens(guidance=60.0, guidance_schedule="linear"))
    twice = sample(images(), SamplerOptions(steps=4, guidance=1.0), classes=[1, 2, 3]).counters
    once = sample(images(), SamplerOptions(steps=4), classes=[1, 2, 3]).counters
    assert (twice.rows, twice.calls, once.rows) == (24, 4, 12)
    many = sample(images(), SamplerOptions(steps=4, guidance=1.0), classes=[1] * 5, batch=2)
    assert many.evaluations == 8 and many.counters.calls == 12


def test_temperatures_change_along_the_steps():
    options = SamplerOptions(steps=5, temperature=2, temperature_final=0, order_temperature=4)
    assert [options.temperature_at(s) for s in range(5)] == [2, 1.5, 1, 0.5, 0]
    assert [options.order_temperature_at(s) for s in range(5)] == pytest.approx(
        [3.2, 2.4, 1.6, 0.8, 0]
    )
    ramp = SamplerOptions(steps=4, guidance=2, guidance_schedule="linear")
    assert [ramp.guidance_at(s) for s in range(4)] == [0.5, 1, 1.5, 2]


def test_a_causal_model_made_bidirectional_samples(text):
    denoiser = text("llama", is_causal=False)
    result = sample(denoiser, SamplerOptions(steps=4), count=2, length=10)
    assert denoiser.spec.legal(264)[result.tokens].all()


@pytest.mark.parametrize(
    "given, message",
    [
        ({}, "one of count, prompts, classes and rows, got none"),
        ({"classes": [1], "prompts": [[1]]}, "got prompts and classes"),
        ({"classes": [10]}, "a class from 0 to 9, got 10"),
        ({"classes": []}, "at least one sample"),
        ({"count": 0}, "at least one sample"),
        ({"count": 2, "classes": [1]}, r"count equal to the number of classes \(1\), got 2"),
        ({"classes": [1], "length": 9}, "the number of tokens to generate: 16, got 9"),
        ({"classes": [1], "seeds": [1, 2]}, "a seed for each of 1 rows, got 2"),
        ({"classes": [1], "batch": 0}, "at least one row at once"),
    ],
)
def test_what_cannot_be_sampled_is_refused(images, given, message):
    denoiser = images()
    with pytest.raises(CompressError, match=message):
        sample(denoiser, SamplerOptions(), **given)
    assert denoiser.counters.calls == 0


@pytest.mark.parametrize(
    "options, given, message",
    [
        ({"steps": 9}, {"count": 1, "length": 8}, "at most as many steps as tokens"),
        ({}, {"count": 1}, "the number of tokens to generate"),
        ({}, {"prompts": [[20], []], "length": 8}, "prompt 1, which is empty"),
        ({}, {"prompts": [[20], [20, 21]], "length": 8}, "prompts of one length, got 1 to 2"),
        ({}, {"prompts": [[6]], "length": 8}, "prompts of ordinary tokens"),
        ({}, {"prompts": [[999]], "length": 8}, "inside the model's vocabulary"),
        ({}, {"classes": [1], "length": 8}, "a model with classes"),
        ({}, {"count": 1, "length": 200}, "at most 128 tokens a sequence"),
        ({}, {"rows": torch.full((1, 8), 20)}, "a mask token"),
        ({}, {"rows": torch.zeros(8)}, "rows of token ids"),
        ({"guidance": 1.0}, {"count": 1, "length": 8}, "a class or a prompt to guide by"),
        ({"block": 3}, {"count": 1, "length": 8}, "a block that divides"),
    ],
)
def test_what_does_not_fit_the_text_is_refused_before_any_work(text, options, given, message):
    denoiser = text()
    with pytest.raises(CompressError, match=message):
        sample(denoiser, SamplerOptions(**options), **given)
    assert denoiser.counters.calls == 0


@pytest.mark.parametrize("token", [27, 3])
def test_rows_of_a_model_with_classes_need_their_class(images, token):
    rows = torch.full((2, 17), 27)
    rows[:, 0] = torch.tensor([16, token])
    with pytest.raises(CompressError, match=f"got {token} in row 1"):
        sample(images(), SamplerOptions(), rows=rows)
    rows[1, 0] = 26
    assert sample(images(), SamplerOptions(), rows=rows).tokens[:, 0].tolist() == [16, 26]


def test_guidance_needs_a_model_trained_without_classes_too(images):
    condition = {"offset": 16, "classes": 10, "null": None}
    denoiser = images(condition=condition)
    with pytest.raises(CompressError, match="set guidance to 0"):
        sample(denoiser, SamplerOptions(guidance=1.0), classes=[1])
    assert denoiser.counters.calls == 0


def test_broken_weights_are_told(images):
    denoiser = images()
    with torch.no_grad():
        next(denoiser.model.parameters()).fill_(float("nan"))
    with pytest.raises(CompressError, match="finite logits"):
        sample(denoiser, SamplerOptions(), classes=[1])


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "cosin"},
        {"order": "ancestral", "block": 4},
        {"order": "ancestral", "threshold": 0.9},
        {"order": "ancestral", "schedule": "even"},
        {"steps": 0},
        {"order": "best"},
        {"step": 3},
    ],
)
def test_options_that_do_not_go_together(options):
    with pytest.raises(ValidationError):
        SamplerOptions(**options)
