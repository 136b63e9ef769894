"""One line of a table, and how its values are written."""

from __future__ import annotations

import math
from typing import NamedTuple

from compress.eval.quality.stats import t_quantile

Interval = tuple[float, float]


class Row(NamedTuple):
    """One line of the table.

    Attributes:
        name: what was measured.
        before, after: formatted values; before is "" where there is no original.
        ratio: after / before, or "" where a ratio says nothing.
        error_before, error_after: formatted 95 % intervals or standard errors, or "".
        error_ratio: the interval of the ratio, or "".
        better: -1 worse than before beyond its error, 1 better, 0 neither or unknown.
    """

    name: str
    before: str
    after: str
    ratio: str = ""
    error_before: str = ""
    error_after: str = ""
    error_ratio: str = ""
    better: int = 0


def number(value: float | None) -> str:
    """Four significant digits, without an exponent up to a million."""
    if value is None:
        return ""
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    digits = 3 - math.floor(math.log10(abs(value))) if value else 2
    return f"{value:,.{max(0, min(digits, 4))}f}"


def count(value: float) -> str:
    """Counts with a unit: 134.5 M."""
    for limit, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= limit:
            return f"{value / limit:.4g}{unit}"
    return f"{value:g}"


def seconds(value: float) -> str:
    """Time with a unit."""
    if value >= 120:
        return f"{value / 60:.1f} min"
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def times(after: float, before: float | None) -> str:
    """after / before as "0.52x", or "" where there is nothing to divide by."""
    return ratio(after / before) if before else ""


def ratio(value: float) -> str:
    """Three significant digits: 0.523x."""
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 2
    return f"{value:,.{max(0, min(digits, 4))}f}x"


def span(bounds: Interval | None) -> str:
    """An interval as "1.2 to 1.5"."""
    return f"{number(bounds[0])} to {number(bounds[1])}" if bounds else ""


def ratios(bounds: Interval | None) -> str:
    """An interval of a ratio as "0.9 to 1.1"."""
    return f"{ratio(bounds[0])[:-1]} to {ratio(bounds[1])[:-1]}" if bounds else ""


def half_width(stderr: float, degrees: int | None = None) -> float:
    """Half of the 95 % interval that a standard error makes: Student's t of its degrees of freedom,
    1.96 where they are not known (older reports) or many."""
    return stderr * (t_quantile(degrees) if degrees else 1.96)


def error_of(stderr: float | None, degrees: int | None = None) -> str:
    """A standard error as half of the 95 % interval."""
    return f"±\u00a0{number(half_width(stderr, degrees))}" if stderr is not None else ""
