"""A scatter plot of quality against cost as inline SVG: no script, no font, no library.

Colours are CSS classes of the page, so the plot follows its light and dark themes. Every label is
escaped. The drawing is 400 x 280 units and scales with the page; at the width of a phone its text
is still about 10 pixels high.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 400, 280
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 20, 44
_DOT, _LINE = 6, 14  # half of a point, a line of text
_LETTER = 7.6  # of a wide font; which one the reader has is unknown
_LONGEST = 28  # letters of a label; the page names the model in full where one points at it
_NEAR = 0.4  # costs of which the least is so much of the largest need not be drawn from zero


class Point(NamedTuple):
    """One model: cost ``x``, quality ``y`` with an optional interval, and how it is drawn."""

    label: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    style: str = "other"  # other | original | frontier


class Axis(NamedTuple):
    """A linear or logarithmic mapping from data to drawing units."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def at(self, value: float) -> float:
        """Return the drawing coordinate of ``value``."""
        low, high, value = (
            (math.log(self.low), math.log(self.high), math.log(value))
            if self.log
            else (self.low, self.high, value)
        )
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return three to seven round values inside the axis."""
        return _log_ticks(self) if self.log else _linear_ticks(self)


def scatter(
    points: Sequence[Point],
    x_label: str,
    y_label: str,
    format_x: Callable[[float], str],
    format_y: Callable[[float], str],
    *,
    arrow: bool = False,
    frontier: bool = False,
) -> str:
    """Draw ``points``; lower y is better or worse as the label says.

    Args:
        points: at least one.
        x_label, y_label: with units.
        format_x, format_y: how tick values are written.
        arrow: draw a line from the first point to the last (before to after).
        frontier: join the points of style "frontier" in order of cost.
    """
    x_axis = _axis([p.x for p in points], LEFT, WIDTH - RIGHT, from_zero=True)
    spans = [v for p in points for v in (p.y, p.low, p.high) if v is not None]
    y_axis = _axis(spans, HEIGHT - BOTTOM, TOP, from_zero=False)
    parts = [*_grid(x_axis, y_axis, x_label, y_label, format_x, format_y)]
    if arrow and len(points) > 1:
        parts.append(_line([points[0], points[-1]], x_axis, y_axis, "link"))
    if frontier:
        chosen = sorted((p for p in points if p.style == "frontier"), key=lambda p: p.x)
        parts.append(_line(chosen, x_axis, y_axis, "front"))
    for each in points:
        told = f"{each.label}: {format_y(each.y)}, {format_x(each.x)}"
        parts.append(_mark(each, x_axis, y_axis, told))
    parts += _labels(points, x_axis, y_axis)
    title = escape(f"{y_label} against {x_label}: " + ", ".join(p.label for p in points))
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">'
        + "".join(parts)
        + "</svg>"
    )


def curves(
    series: Sequence[tuple[str, str, Sequence[Point]]],
    x_label: str,
    y_label: str,
    format_x: Callable[[float], str],
    format_y: Callable[[float], str],
) -> str:
    """Draw a joined line of points for each series.

    Args:
        series: name, style (original | frontier | other) and points; the name stands at the last
            point, the labels of the points are not drawn.
    """
    points = [p for _, _, line in series for p in line]
    x_axis = _axis([p.x for p in points], LEFT, WIDTH - RIGHT, from_zero=True)
    spans = [v for p in points for v in (p.y, p.low, p.high) if v is not None]
    y_axis = _axis(spans, HEIGHT - BOTTOM, TOP, from_zero=False)
    parts = [*_grid(x_axis, y_axis, x_label, y_label, format_x, format_y)]
    ends = []
    for name, style, line in series:
        styled = [p._replace(style=style) for p in sorted(line, key=lambda p: p.x)]
        parts.append(_line(styled, x_axis, y_axis, f"front {style}"))
        parts += [_mark(p, x_axis, y_axis) for p in styled]
        ends.append(styled[-1]._replace(label=name))
    parts += _labels([p for p in ends if p.label], x_axis, y_axis)
    title = escape(f"{y_label} against {x_label}: " + ", ".join(name for name, _, _ in series))
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">'
        + "".join(parts)
        + "</svg>"
    )


def _axis(values: Sequence[float], start: float, end: float, *, from_zero: bool) -> Axis:
    low, high = min(values), max(values)
    log = low > 0 and high / low > 8
    if log:
        pad = math.exp(0.12 * (math.log(high) - math.log(low)))
        # A ruined model's perplexity can be the largest number there is.
        return Axis(low / pad, min(high * pad, sys.float_info.max), start, end, True)
    pad = 0.15 * (high - low) or 0.1 * abs(high) or 1.0
    # Costs that differ much start at zero, so that distances along the axis are honest; those that
    # are near each other would all stand at its end. Quality has no zero.
    zero = from_zero and low < _NEAR * high
    return Axis(0.0 if zero else low - pad, high + pad, start, end, False)


def _linear_ticks(axis: Axis) -> list[float]:
    raw = (axis.high - axis.low) / 5
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
    first = math.ceil(axis.low / step)
    return [i * step for i in range(first, math.floor(axis.high / step) + 1)]


def _log_ticks(axis: Axis) -> list[float]:
    first, last = math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high))
    powers = range(first, min(last, sys.float_info.max_10_exp) + 1, 1 + (last - first) // 8)
    for steps in ((1,), (1, 3), (1, 2, 5)):
        ticks = [m * 10.0**p for p in powers for m in steps if axis.low <= m * 10.0**p <= axis.high]
        if len(ticks) >= 3:
            break
    return ticks


def _grid(
    x_axis: Axis,
    y_axis: Axis,
    x_label: str,
    y_label: str,
    format_x: Callable[[float], str],
    format_y: Callable[[float], str],
) -> list[str]:
    base = HEIGHT - BOTTOM
    parts = []
    for value in y_axis.ticks():
        y = y_axis.at(value)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(_text(LEFT - 6, y + 3.5, format_y(value), "tick", "end"))
    for value in x_axis.ticks():
        told = format_x(value)
        x = min(x_axis.at(value), WIDTH - 2 - _LETTER * len(told) / 2)
        parts.append(_text(x, base + 15, told, "tick", "middle"))
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label, "title", "middle"))
    parts.append(_text(4, 10, y_label, "title", "start"))
    return parts


def _line(points: Sequence[Point], x_axis: Axis, y_axis: Axis, style: str) -> str:
    path = " ".join(f"{x_axis.at(p.x):.1f},{y_axis.at(p.y):.1f}" for p in points)
    return f'<polyline class="{style}" points="{path}"/>'


def _mark(point: Point, x_axis: Axis, y_axis: Axis, told: str = "") -> str:
    x, y = x_axis.at(point.x), y_axis.at(point.y)
    bar = ""
    if point.low is not None and point.high is not None:
        low, high = y_axis.at(point.low), y_axis.at(point.high)
        ends = f'x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"'
        bar = f'<line class="bar {point.style}" {ends}/>'
    circle = f'<circle class="dot {point.style}" cx="{x:.1f}" cy="{y:.1f}" r="5"'
    title = f"<title>{escape(told)}</title>" if told else ""  # shown where one points at it
    return f"{bar}{circle}>{title}</circle>" if told else f"{bar}{circle}/>"


class Box(NamedTuple):
    """A rectangle of the drawing."""

    left: float
    top: float
    right: float
    bottom: float

    def shared(self, other: Box) -> float:
        """Area that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)


def _labels(points: Sequence[Point], x_axis: Axis, y_axis: Axis) -> list[str]:
    """Write each label near its point where it covers neither a point nor another label; a thin
    line leads to one that had to go further."""
    places = [(x_axis.at(p.x), y_axis.at(p.y)) for p in points]
    dots = [Box(x - _DOT, y - _DOT, x + _DOT, y + _DOT) for x, y in places]
    parts: list[str] = []
    taken: list[Box] = []
    for point, (x, y) in sorted(zip(points, places, strict=True), key=lambda pair: pair[1][1]):
        label = point.label if len(point.label) <= _LONGEST else point.label[: _LONGEST - 1] + "…"
        box = _place(x, y, _LETTER * len(label), [*dots, *taken])
        taken.append(box)
        near = min(max(x, box.left), box.right), min(max(y, box.top), box.bottom)
        if math.dist((x, y), near) > 2 * _DOT:
            ends = f'x1="{x:.1f}" y1="{y:.1f}" x2="{near[0]:.1f}" y2="{near[1]:.1f}"'
            parts.append(f'<line class="leader" {ends}/>')
        middle = (box.left + box.right) / 2
        anchor = "middle"
        if box.left > x:
            middle, anchor = box.left, "start"
        elif box.right < x:
            middle, anchor = box.right, "end"
        parts.append(_text(middle, box.bottom - 3, label, f"label {point.style}", anchor))
    return parts


def _place(x: float, y: float, width: float, others: Sequence[Box]) -> Box:
    """The nearest box for a label of a point that covers least, which mostly is nothing."""
    best, least = None, math.inf
    for away in range(0, 12):
        shift = away * _LINE / 2
        for left in (x + 9, x - 9 - width, x - width / 2):
            over = left < x < left + width  # a label above or below its point keeps clear of it
            for down in (-shift, shift):
                top = y - _LINE / 2 + down
                if over and abs(down) < _LINE / 2 + _DOT:
                    continue
                box = Box(left, top, left + width, top + _LINE)
                if box.left < 2 or box.right > WIDTH - 2:
                    continue
                if box.top < TOP - 6 or box.bottom > HEIGHT - BOTTOM:
                    continue
                covered = sum(box.shared(other) for other in others)
                if covered < least:
                    best, least = box, covered
                if not covered:
                    return box
    return best or Box(max(2.0, WIDTH - 2 - width), y - _LINE / 2, WIDTH - 2, y + _LINE / 2)


def _text(x: float, y: float, text: str, style: str, anchor: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{style}" {place}>{escape(text)}</text>'
