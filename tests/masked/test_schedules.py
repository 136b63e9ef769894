"""Reveal counts: the exact numbers of the published samplers."""

from __future__ import annotations

import math

import pytest

from compress.errors import CompressError
from compress.generators import reveal_plan, schedule_value

SCHEDULES = ("cosine", "linear", "log", "exp", "pow:2.5", "pow:0.5")


def revealed(unknown: int, steps: int, schedule: str, block: int | None = None) -> list[int]:
    plan = reveal_plan(unknown, steps, schedule, block)
    found, left, current = [], 0, -1
    for number, after in plan:
        if number != current:
            current, left = number, block or unknown
        found.append(left - after)
        left = after
    return found


def test_maskgit_counts():
    assert revealed(256, 8, "cosine") == [5, 15, 24, 31, 39, 45, 48, 49]
    assert revealed(256, 12, "cosine") == [3, 6, 11, 15, 18, 22, 26, 27, 31, 31, 33, 33]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("unknown, steps", [(256, 8), (17, 5), (16, 16), (10, 10), (7, 1)])
def test_masks_left_follow_the_clamped_schedule(schedule, unknown, steps):
    now = unknown
    for step, (_, left) in enumerate(reveal_plan(unknown, steps, schedule)):
        wanted = math.floor(unknown * schedule_value(schedule, (step + 1) / steps) + 1e-9)
        assert left == (0 if step == steps - 1 else max(1, min(now - 1, wanted)))
        now = left


@pytest.mark.parametrize("schedule", [*SCHEDULES, "even"])
@pytest.mark.parametrize("unknown, steps", [(256, 8), (17, 5), (16, 16), (5, 4), (1, 1)])
def test_each_step_reveals_and_all_is_revealed(schedule, unknown, steps):
    counts = revealed(unknown, steps, schedule)
    assert len(counts) == steps and sum(counts) == unknown and min(counts) >= 1


def test_llada_counts_differ_by_at_most_one_and_the_remainder_comes_first():
    for unknown, steps in ((32, 5), (10, 4), (9, 9)):
        counts = revealed(unknown, steps, "even")
        assert sum(counts) == unknown and max(counts) - min(counts) <= 1
        assert counts == sorted(counts, reverse=True)


def test_blocks_share_the_steps():
    assert revealed(12, 6, "even", block=4) == [2, 2] * 3
    assert [b for b, _ in reveal_plan(12, 6, "even", 4)] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_fall_from_one_to_zero(name):
    values = [schedule_value(name, i / 50, 64) for i in range(51)]
    assert values[0] == 1 and values[-1] == 0
    assert all(a >= b for a, b in zip(values, values[1:], strict=False))


def test_schedule_formulas():
    assert schedule_value("cosine", 1 / 3) == pytest.approx(math.cos(math.pi / 6))
    assert schedule_value("pow:2.5", 0.5) == pytest.approx(1 - 0.5**2.5)
    assert schedule_value("log", 0.25, 256) == pytest.approx(2 / 8)
    assert schedule_value("exp", 0.5, 256) == pytest.approx((1 - 2**-4) / (1 - 2**-8))


@pytest.mark.parametrize("name", ["cosin", "pow:0", "pow:x", "pow:inf", "even"])
def test_unknown_schedules_are_refused(name):
    with pytest.raises(CompressError, match="expected a schedule"):
        schedule_value(name, 0.5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((16, 17, "cosine"), r"at most as many steps as tokens to generate \(16\), got 17 steps"),
        ((16, 0, "cosine"), "at least one step"),
        ((16, 4, "even", 5), "a block that divides the 16 tokens"),
        ((16, 6, "even", 4), "divide evenly among 4 blocks"),
    ],
)
def test_plans_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(CompressError, match=message):
        reveal_plan(*arguments)
