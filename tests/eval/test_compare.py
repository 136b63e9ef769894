"""Comparisons: which results nothing beats, what cannot be compared, and how it is drawn."""

from __future__ import annotations

import math
import sys

import pytest

from compress.errors import CompressError
from compress.eval.report.compare import Entry, compare
from compress.eval.report.plot import Point, scatter
from compress.eval.report.rows import number


def test_frontier_keeps_what_nothing_beats(result) -> None:
    entries = [
        Entry("dense", result(3.0, size=1000), original=True),
        Entry("good", result(3.1, size=500)),
        Entry("bad", result(3.5, size=600)),
        Entry("small", result(4.0, size=200)),
    ]
    found = compare(entries)
    assert found.frontier["checkpoint on disk"] == {"dense", "good", "small"}
    assert len(found.costs) == 1
    assert found.html().count("<circle") == 4
    shown = number(entries[2].result.perplexity.perplexity)
    assert f"| bad | {shown} (" in found.markdown()


def test_reports_share_their_original_and_names_stay_apart(result, report) -> None:
    found = compare([report(result(), result(4.0)), report(result(), result(5.0))])
    assert [e.name for e in found.entries] == ["original (m)", "a run", "a run (2)"]


def test_accuracy_counts_upwards(result) -> None:
    entries = [
        Entry(name, result(accuracy=a, size=s).model_copy(update={"perplexity": None}))
        for name, a, s in (("a", 0.7, 1000), ("b", 0.6, 1000))
    ]
    assert compare(entries).frontier["checkpoint on disk"] == {"a"}


def test_refusals(result) -> None:
    with pytest.raises(CompressError, match="at least two"):
        compare([Entry("a", result())])
    with pytest.raises(CompressError, match="same tokens and windows as a"):
        compare([Entry("a", result()), Entry("b", result(text="another"))])
    bare = result().model_copy(update={"perplexity": None})
    with pytest.raises(CompressError, match="a quality in common"):
        compare([Entry("a", bare), Entry("b", bare)])


@pytest.mark.parametrize("values", [[5.0], [5.0, 5.0], [0.0, 1.0], [1.0, 1e6], [-1.0, 3.0]])
def test_plots_draw_any_spread(values) -> None:
    points = [Point(str(i), abs(v), v, v - 1, v + 1) for i, v in enumerate(values)]
    drawn = scatter(points, "x", "y", str, str, frontier=True)
    assert drawn.count("<circle") == len(values) and "nan" not in drawn


@pytest.mark.parametrize("largest", [math.exp(700), sys.float_info.max])
def test_a_ruined_model_beside_a_sound_one_is_drawn(largest) -> None:
    points = [Point("a", 1.0, 10.0), Point("b", 2.0, largest)]
    page = scatter(points, "size", "perplexity", str, str)
    assert "nan" not in page and "inf" not in page and page.count("<text") < 40
