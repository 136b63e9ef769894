"""Intervals: small, dependency-free statistics that every measurement here shares."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

# Student's t, 97.5 % quantile, for 1 to 8 degrees of freedom, where the expansion is too coarse.
_T_SMALL = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060)

_Z = 1.959964  # the normal distribution's 97.5 % quantile


def t_quantile(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's t (expansion of Abramowitz & Stegun, 26.7.5)."""
    if degrees < 1:
        return math.inf
    if degrees <= len(_T_SMALL):
        return _T_SMALL[degrees - 1]
    z = _Z
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )


def clustered_mean(sums: Sequence[float], weights: Sequence[float]) -> tuple[float, float | None]:
    """Return the ratio ``sum(sums) / sum(weights)`` and its standard error, clusters as units.

    For clusters that are independent of each other, as images or generated texts are; pieces of one
    text are not, see :func:`serial_mean`. This is the linearised ratio estimator (Cochran, Sampling
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


class SerialMean(NamedTuple):
    """A mean over consecutive pieces of one text.

    Attributes:
        value: the mean. error: its standard error, None with fewer than two pieces.
        degrees: of freedom of the error; the fewer, the wider an interval of 95 %.
    """

    value: float
    error: float | None
    degrees: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval, or None where there is no error."""
        if self.error is None:
            return None
        half = t_quantile(self.degrees) * self.error
        return self.value - half, self.value + half


def serial_mean(sums: Sequence[float], weights: Sequence[float]) -> SerialMean:
    """Return ``sum(sums) / sum(weights)`` with an error that neighbours may correlate in.

    Windows that follow one another in a text share articles and topics: their likelihoods
    correlate (0.5 to 0.6 at lag 1 on Wikipedia), and taken as independent they give an interval
    half as wide as it should be. The variance of their sum is the spectrum of the series at
    frequency zero. It is estimated by the mean of the first B squared cosine transforms (all of
    expectation n times that spectrum, and nearly independent), hence with B degrees of freedom:
    the equal-weighted cosine estimator of Lazarus, Lewis, Stock & Watson 2018 (Journal of Business
    & Economic Statistics 36:541) with their B = 0.4 n^(2/3). Of independent pieces it is right too,
    only less sure of itself. It sees the linearised residuals of :func:`clustered_mean`.

    Args:
        sums: per piece, in the order of the text, the sum of the quantity (say, nats).
        weights: per piece, the number of items summed (say, tokens).
    """
    total = math.fsum(weights)
    mean = math.fsum(sums) / total
    n = len(sums)
    if n < 2:
        return SerialMean(mean, None, 0)
    degrees = min(n - 1, max(4, int(0.4 * n ** (2 / 3))))
    residuals = [s - mean * w for s, w in zip(sums, weights, strict=True)]
    squares = math.fsum(
        math.fsum(r * math.cos(math.pi * j * (i + 0.5) / n) for i, r in enumerate(residuals)) ** 2
        for j in range(1, degrees + 1)
    )
    return SerialMean(mean, math.sqrt(2 * squares / degrees) / total, degrees)


def median_interval(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Return the median and an interval that holds the true one with 95 % or more.

    Between two order statistics, by the binomial distribution; whatever the values' distribution.
    Fewer than six values do not carry 95 %: they give their smallest and largest (94 % of five).
    """
    ordered, n = sorted(values), len(values)
    outside, cut = 0.0, 0
    for k in range((n - 1) // 2):
        outside += 2 * math.comb(n, k) / 2**n
        if outside > 0.05:
            break
        cut = k
    return statistics.median(ordered), (ordered[cut], ordered[n - 1 - cut])


def share_interval(hits: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of independent trials (Wilson 1927, J. Am. Stat. Assoc. 22:209).

    Unlike that of a normal distribution around the share it keeps its level near 0 and 1, and never
    leaves them.
    """
    z = _Z
    middle = (hits + z * z / 2) / (count + z * z)
    half = z / (count + z * z) * math.sqrt(hits * (count - hits) / count + z * z / 4)
    return max(0.0, middle - half), min(1.0, middle + half)


def share_error(hits: float, count: int) -> float:
    """The standard error of a share that two hits and two misses more would give (Agresti & Coull
    1998, Am. Stat. 52:119): above 0 also where all trials, or none, are hits."""
    trials = count + 4
    share = (hits + 2) / trials
    return math.sqrt(share * (1 - share) / trials)


def matched_difference(first: int, second: int, count: int) -> tuple[float, tuple[float, float]]:
    """The difference of two shares of the same trials, and its 95 % interval.

    Half a trial is added to each of the four outcomes of a pair (Agresti & Min 2005, Statistics in
    Medicine 24:729): without it two models that agree on every trial would be called equal beyond
    doubt, however few the trials.

    Args:
        first: trials that only the first side won. second: those that only the second one won.
        count: all trials.

    Returns:
        (second - first) / count, and the interval, which lies around a value nearer to 0.
    """
    a, b, n = first + 0.5, second + 0.5, count + 2.0
    middle = (b - a) / n
    half = _Z * math.sqrt(max(0.0, a + b - (b - a) ** 2 / n)) / n
    return (second - first) / count, (middle - half, middle + half)
