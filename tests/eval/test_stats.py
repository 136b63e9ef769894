"""Intervals: exact cases and coverage."""

from __future__ import annotations

import pytest
import torch

from compress.eval.quality.stats import clustered_mean, median_interval, serial_mean, t_quantile


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


def test_one_cluster_has_no_error() -> None:
    assert clustered_mean([5.0], [2.0]) == (2.5, None)
    assert serial_mean([5.0], [2.0]).interval is None


def test_a_serial_mean_of_a_few_windows_has_the_plain_standard_error() -> None:
    sums, weights = [2.0, 6.0, 10.0, 3.0], [2.0, 2.0, 2.0, 3.0]
    found = serial_mean(sums, weights)
    assert (found.value, found.error) == pytest.approx(clustered_mean(sums, weights))
    assert found.degrees == 3


@pytest.mark.parametrize("windows", [32, 240])
@pytest.mark.parametrize("correlation", [0.0, 0.6])
def test_the_interval_covers_the_mean_of_a_text_whose_windows_are_alike(windows, correlation):
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(windows, 600, generator=draw, dtype=torch.float64)
    series = [noise[0]]
    for fresh in noise[1:]:
        series.append(correlation * series[-1] + (1 - correlation**2) ** 0.5 * fresh)
    covered = []
    for nats in torch.stack(series, dim=1).tolist():
        low, high = serial_mean(nats, [1.0] * windows).interval
        covered.append(low <= 0 <= high)
    assert 0.91 < sum(covered) / len(covered) < 0.98


def test_the_interval_of_a_median_lies_between_order_statistics() -> None:
    assert median_interval([3.0, 1.0, 2.0]) == (2.0, (1.0, 3.0))
    assert median_interval([float(i) for i in range(7)]) == (3.0, (0.0, 6.0))
    # At most 3 of 15 on either side with probability 0.035, at most 4 with 0.118.
    assert median_interval([float(i) for i in range(15)]) == (7.0, (3.0, 11.0))
