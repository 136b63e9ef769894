"""Intervals: small, dependency-free statistics that every measurement here shares."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence

# Student's t, 97.5 % quantile, for 1 to 8 degrees of freedom, where the expansion is too coarse.
_T_SMALL = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060)


def t_quantile(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's t (expansion of Abramowitz & Stegun, 26.7.5)."""
    if degrees < 1:
        return math.inf
    if degrees <= len(_T_SMALL):
        return _T_SMALL[degrees - 1]
    z = 1.959964
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )


def clustered_mean(sums: Sequence[float], weights: Sequence[float]) -> tuple[float, float | None]:
    """Return the ratio ``sum(sums) / sum(weights)`` and its standard error, clusters as units.

    Tokens inside one window share a text, so they are correlated; a window is the smallest piece
    that can be called independent. This is the linearised ratio estimator (Cochran, Sampling
    Techniques, eq. 6.13).

    Args:
        sums: per cluster, the sum of the quantity (say, nats).
        weights: per cluster, the number of items summed (say, tokens).

    Returns:
        Mean and standard error; the error is None with fewer than two clusters.
    """
    total = math.fsum(weights)
    mean = math.fsum(sums) / total
    n = len(sums)
    if n < 2:
        return mean, None
    squares = math.fsum((s - mean * w) ** 2 for s, w in zip(sums, weights, strict=True))
    return mean, math.sqrt(squares * n / (n - 1)) / total


def interval(mean: float, error: float | None, clusters: int) -> tuple[float, float] | None:
    """Return the 95 % interval ``mean +- t * error``, or None when there is no error."""
    if error is None:
        return None
    half = t_quantile(clusters - 1) * error
    return mean - half, mean + half


def bootstrap_median(
    values: Sequence[float], *, draws: int = 2000, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """Return the median and its 95 % percentile-bootstrap interval (Efron 1979)."""
    generator = random.Random(seed)
    medians = sorted(
        statistics.median(generator.choices(values, k=len(values))) for _ in range(draws)
    )
    low, high = medians[int(0.025 * draws)], medians[int(0.975 * draws) - 1]
    return statistics.median(values), (low, high)
