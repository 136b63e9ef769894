"""Options, the schedule as a pure function, seeds, sources."""

from __future__ import annotations

import pytest
import torch

from compress.errors import CompressError
from compress.train import Moment, TokenSource, TrainingOptions, learning_rate
from compress.train.options import compute_dtype


@pytest.mark.parametrize(
    "schedule, middle, end", [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1, 1)]
)
def test_schedule(schedule, middle, end):
    options = TrainingOptions(
        steps=104, warmup=4, learning_rate=1.0, schedule=schedule, final_ratio=0.1
    )
    warm = [learning_rate(options, step) for step in range(5)]
    assert warm == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert learning_rate(options, 54) == pytest.approx(middle)
    assert learning_rate(options, 104) == pytest.approx(end)


def test_cosine_is_flat_at_both_ends():
    options = TrainingOptions(steps=100, learning_rate=1.0)
    assert learning_rate(options, 10) == pytest.approx(0.9755, abs=1e-4)
    assert learning_rate(options, 90) == pytest.approx(0.0245, abs=1e-4)


def test_micro_batches_divide_the_batch():
    assert TrainingOptions(steps=1, batch=8, micro_batch=2).micro_batches == 4
    assert TrainingOptions(steps=1, batch=8).micro_batches == 1
    with pytest.raises(CompressError, match="batch 8 and micro_batch 3"):
        TrainingOptions(steps=1, batch=8, micro_batch=3)


def test_moments_differ_in_all_their_parts():
    seeds = [
        Moment(step, 9, seed, micro).number(stream)
        for step in range(2)
        for seed in range(2)
        for micro in range(2)
        for stream in range(2)
    ]
    assert len(set(seeds)) == 16
    assert all(0 <= s < 2**63 for s in seeds)


def test_shared_noise_is_the_same_for_all_micro_batches_of_a_step():
    first, second, later = Moment(3, 9, 0, 0), Moment(3, 9, 0, 1), Moment(4, 9, 0, 0)
    assert first.number(shared=True) == second.number(shared=True) != later.number(shared=True)
    draws = [torch.rand(3, generator=m.generator(stream=2)) for m in (first, first, second)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert Moment(3, 12, 0).progress == 0.25


def test_token_source_gives_rows_and_labels():
    tokens = torch.arange(12, dtype=torch.int32).view(4, 3)
    batch = TokenSource(tokens, -tokens).get(torch.tensor([2, 0]))
    assert batch["input_ids"].tolist() == [[6, 7, 8], [0, 1, 2]]
    assert batch["labels"].tolist() == [[-6, -7, -8], [0, -1, -2]]
    assert batch["input_ids"].dtype == torch.int64


def test_token_source_refuses_what_it_cannot_stack():
    for tokens in (torch.zeros(3), torch.zeros(2, 2), torch.zeros(0, 4, dtype=torch.int64)):
        with pytest.raises(CompressError, match="integer token ids"):
            TokenSource(tokens)
    with pytest.raises(CompressError, match="labels of the tokens' shape"):
        TokenSource(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64))


def test_float16_needs_a_gpu():
    with pytest.raises(CompressError, match="GPU for training in float16"):
        compute_dtype("float16", torch.device("cpu"))
    assert compute_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
