"""Comparisons: which results nothing beats, what cannot be compared, and how it is drawn."""

from __future__ import annotations

import csv
import json
import math
import re
import sys

import pytest

from compress.errors import CompressError
from compress.eval.quality.generator import GeneratorResult
from compress.eval.quality.likelihood import LikelihoodResult
from compress.eval.report.compare import Entry, compare
from compress.eval.report.plot import Point, _axis, _labels, scatter
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


def test_columns_sorting_and_files(result, tmp_path) -> None:
    entries = [
        Entry("slow", result(3.3, size=300, accuracy=0.5), seconds=90.0),
        Entry("dense", result(3.0, accuracy=0.7), original=True),
        Entry("quick", result(3.1, size=500, speedup=(1.9, 2.0, 2.1))),
    ]
    found = compare(entries)
    assert [e.name for e in found.entries] == ["dense", "quick", "slow"]
    keys = [c.key for c in found.columns]
    assert "piqa" in keys and "seconds" in keys and "prefill" in keys and "decode" not in keys
    by_size = compare(entries, ["size", "piqa"], "size")
    assert [e.name for e in by_size.entries] == ["dense", "slow", "quick"]
    assert by_size.head() == ("", "on disk", "piqa acc", "unbeaten in")
    with pytest.raises(CompressError, match="Did you mean 'prefill'"):
        compare(entries, ["prefil"])
    page = found.write(tmp_path / "page.html")
    rows = list(csv.DictReader((tmp_path / "page.csv").open()))
    told = json.loads((tmp_path / "page.json").read_text())["entries"]
    assert [row["name"] for row in rows] == [row["name"] for row in told]
    assert float(rows[2]["quality"]) == told[2]["quality"] and rows[2]["seconds"] == "90.0"
    assert told[1]["piqa"] is None and rows[1]["piqa"] == ""
    assert 'data-name="on disk"' in page.read_text()


def test_labels_cover_neither_points_nor_each_other() -> None:
    points = [Point(f"a model called {i}", 100 + i % 3, 10 + i / 40) for i in range(9)]
    xs, ys = _axis([p.x for p in points], 46, 386, from_zero=True), _axis(
        [p.y for p in points], 236, 20, from_zero=False
    )  # fmt: skip
    dots = [(xs.at(p.x), ys.at(p.y)) for p in points]
    boxes = []
    drawn = "".join(_labels(points, xs, ys))
    for text in re.finditer(r'label[^"]*" x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)"', drawn):
        x, y, anchor = float(text[1]), float(text[2]), text[3]
        width = 7 * len("a model called 0")
        left = {"start": x, "middle": x - width / 2, "end": x - width}[anchor]
        boxes.append((left, y - 9, left + width, y + 1))
    assert len(boxes) == 9 and all(box[0] >= 0 and box[2] <= 400 for box in boxes)
    for index, box in enumerate(boxes):
        assert not any(box[0] < x < box[2] and box[1] < y < box[3] for x, y in dots)
        for other in boxes[:index]:
            assert box[2] <= other[0] or other[2] <= box[0] or box[3] <= other[1] or (
                other[3] <= box[1]
            )  # fmt: skip


def test_near_costs_use_the_room() -> None:
    assert _axis([98.0, 100.0], 0, 100, from_zero=True).low > 90
    assert _axis([20.0, 100.0], 0, 100, from_zero=True).low == 0


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


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("perplexity", "stride", 10), ("masked", "mask_fraction", 0.5),
        ("masked", "packing", "documents"), ("tasks", "limit", 10), ("tasks", "score", "pll"),
        ("piqa", "num_fewshot", 5), ("piqa", "version", "2"), ("masked", "seed", 1),
        ("spec", "special_tokens", False),
    ],
)  # fmt: skip
def test_what_was_measured_differently_is_refused(result, masked, part, field, value) -> None:
    one = masked(0.5) if part == "masked" else result(accuracy=0.5)
    if part == "spec":
        one = one.model_copy(update={"perplexity": None})
    if part == "piqa":
        task = one.tasks.tasks[part].model_copy(update={field: value})
        part, field, value = "tasks", "tasks", {"piqa": task}
    other = one.model_copy(update={part: getattr(one, part).model_copy(update={field: value})})
    words = f"b, .*with {field} {value} and not"
    if field == "tasks":
        words = "num_fewshot 5 and not 0|version 2 and not 1"
    with pytest.raises(CompressError, match=words):
        compare([Entry("a", one), Entry("b", other)])
    bare = other.model_copy(update={"tasks": None})
    if part == "tasks":  # a task that only one has is beside the point
        assert len(compare([Entry("a", one), Entry("b", bare)]).entries) == 2


def test_tasks_of_other_files_are_refused(result) -> None:
    def of(files: dict[str, str]):
        one = result(accuracy=0.5)
        task = one.tasks.tasks["piqa"].model_copy(update={"files": files})
        return one.model_copy(
            update={"tasks": one.tasks.model_copy(update={"tasks": {"piqa": task}})}
        )

    one, other, hub = Entry("a", of({"f": "0"})), Entry("b", of({"f": "1"})), Entry("c", of({}))
    with pytest.raises(CompressError, match="same files of piqa as a"):
        compare([hub, one, other])
    assert len(compare([hub, one, one]).entries) == 3  # of the hub's nothing is known


def test_bounds_of_other_masks_are_refused(result) -> None:
    def of(**masks):
        bound = LikelihoodResult(
            rule="any order", nats=1.0, nats_stderr=None, perplexity=math.e,
            perplexity_interval=None, bits_per_token=1.4, sequences=1, tokens=8, window=8,
            evaluations=8, window_nll=[1.0], **{"draws": 8, "seed": 0, **masks},
        )  # fmt: skip
        generator = GeneratorResult(likelihood=bound)
        return result().model_copy(update={"perplexity": None, "generator": generator})

    assert len(compare([Entry("a", of()), Entry("b", of())]).entries) == 2
    for field, value in {"draws": 16, "seed": 1}.items():
        with pytest.raises(CompressError, match=f"with {field} {value} and not"):
            compare([Entry("a", of()), Entry("b", of(**{field: value}))])


def test_costs_that_were_measured_with_other_tokens_share_no_column(result) -> None:
    one = result(macs=500, speedup=(1.9, 2.0, 2.1))
    other = result(macs=400, speedup=(2.9, 3.0, 3.1))
    cost = other.cost.model_copy(
        update={
            "macs": other.cost.macs.model_copy(update={"context": 128}),
            "memory": other.cost.memory.model_copy(update={"tokens": 16}),
        }
    )
    latency = other.latency.model_copy(update={"prefill_tokens": 16})
    longer = other.model_copy(update={"cost": cost, "latency": latency})
    found = compare([Entry("a", one), Entry("b", longer)])
    told = {row["name"]: row for row in found.data()["entries"]}
    for key in ("macs", "memory", "prefill"):
        assert told["a"][key] is not None and told["b"][key] is None
    assert "MACs per token" not in found.frontier
    assert "MACs per token" in compare([Entry("a", one), Entry("b", other)]).frontier


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
