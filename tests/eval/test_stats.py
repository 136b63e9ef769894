"""Intervals: exact cases and coverage."""

from __future__ import annotations

import random

import pytest

from compress.eval.stats import bootstrap_median, clustered_mean, interval, t_quantile


@pytest.mark.parametrize(
    ("degrees", "expected"), [(1, 12.706), (4, 2.776), (5, 2.571), (10, 2.228), (100, 1.984)]
)
def test_t_quantile_matches_the_tables(degrees: int, expected: float) -> None:
    assert t_quantile(degrees) == pytest.approx(expected, abs=1e-3)


def test_clustered_mean_weights_clusters_and_is_plain_for_equal_ones() -> None:
    mean, error = clustered_mean([2.0, 6.0, 10.0], [2.0, 2.0, 2.0])
    assert mean == pytest.approx(3.0)
    # Per-item means 1, 3, 5: standard deviation 2, over three clusters.
    assert error == pytest.approx(2 / 3**0.5)
    assert clustered_mean([2.0, 30.0], [2.0, 10.0])[0] == pytest.approx(32 / 12)


def test_one_cluster_has_no_interval() -> None:
    mean, error = clustered_mean([5.0], [2.0])
    assert (mean, error) == (2.5, None)
    assert interval(mean, error, 1) is None


def test_interval_covers_the_mean_about_95_times_in_100() -> None:
    draw = random.Random(0)
    covered = 0
    for _ in range(1000):
        sums = [draw.gauss(1.0, 0.5) for _ in range(8)]
        mean, error = clustered_mean(sums, [1.0] * 8)
        low, high = interval(mean, error, 8)
        covered += low <= 1.0 <= high
    assert 930 <= covered <= 970


def test_bootstrap_of_the_median_is_seeded_and_brackets_it() -> None:
    values = [1.0, 1.1, 0.9, 1.2, 1.05]
    median, (low, high) = bootstrap_median(values)
    assert low <= median <= high
    assert (median, (low, high)) == bootstrap_median(values)
