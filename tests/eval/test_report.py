"""Reports: their rows, that they escape, that they survive JSON."""

from __future__ import annotations

import io
import json
import math
from html.parser import HTMLParser

import pytest

from compress.errors import CompressError
from compress.eval.report import (
    DataEntry,
    Report,
    StepEntry,
    load_report,
    print_report,
    render_html,
    render_markdown,
    with_findings,
    write_report,
)
from compress.eval.report.cells import error_of
from compress.eval.report.compare import Entry, compare
from compress.eval.report.html import written_options
from compress.eval.report.points import quality_axis
from compress.eval.report.rows import cost_rows, number, quality_ratio, quality_rows, ratio
from compress.eval.report.verdict import verdict
from compress.eval.report.verdicts import masked_accuracy_loss
from compress.eval.spec import ToleranceSpec

EVIL = '<script>alert("x")</script>&<img src=x onerror=alert(1)>|`'


def test_the_ratio_is_paired_by_window(result) -> None:
    before, after = result(3.0), result(3.2)
    factor, (low, high) = quality_ratio(before, after)
    assert factor == pytest.approx(math.exp(0.2))
    # Both scattered alike, so the difference does not scatter at all.
    assert high - low < 1e-6
    assert quality_ratio(before, result(text="another")) is None


def test_the_ratio_weighs_windows_by_their_tokens(result) -> None:
    before, after = (
        scored.model_copy(
            update={"perplexity": scored.perplexity.model_copy(
                update={"window_nll": nll, "window_tokens": [300, 100]})}
        )
        for scored, nll in ((result(), [3.0, 3.0]), (result(), [3.0, 3.4]))
    )  # fmt: skip
    assert quality_ratio(before, after)[0] == pytest.approx(math.exp(0.1))


def test_rows(result, report) -> None:
    full = report(result(size=2000, accuracy=0.5), result(accuracy=0.5, speedup=(1.9, 2.0, 2.1)))
    rows = {row.name: row for row in (*quality_rows(full), *cost_rows(full))}
    assert rows["Checkpoint"].ratio == "0.500x" and rows["Checkpoint"].better == 1
    prefill = rows["Prefill, 8 tokens"]
    assert (prefill.ratio, prefill.error_ratio) == ("0.500x", "0.476 to 0.526")
    assert rows["piqa acc"].better == 0
    alone = report()
    assert all(row.before == "" and row.ratio == "" for row in quality_rows(alone))


def test_formats() -> None:
    values = [0, 0.25, 1, 23.94, 496.2, 1234.6, 1e9]
    assert [number(v) for v in values] == [
        "0.00", "0.2500", "1.000", "23.94", "496.2", "1,235", "1e+09"
    ]  # fmt: skip
    assert [ratio(v) for v in (0.0523, 0.523, 1, 12.34)] == ["0.0523x", "0.523x", "1.00x", "12.3x"]


def test_few_degrees_of_freedom_widen_intervals(masked) -> None:
    old, few = masked(0.87), masked(0.87)
    few = few.model_copy(update={"masked": few.masked.model_copy(update={"degrees": 4})})
    assert error_of(0.1) == "±\u00a00.1960" and error_of(0.1, 4) == "±\u00a00.2776"
    axis = quality_axis([old, few])
    assert axis.of(old)[2] == pytest.approx(1.196) and axis.of(few)[2] == pytest.approx(1.27764)
    spec = ToleranceSpec()
    before, after = old.masked, few.masked
    many = masked_accuracy_loss(before, before, False, spec).interval
    assert many[1] == pytest.approx(1.96 * 0.04 * math.sqrt(2))
    # Welch's degrees of two errors alike are those of both together.
    both = masked_accuracy_loss(after, after, False, spec).interval
    assert both[1] == pytest.approx(2.3060 * 0.04 * math.sqrt(2))


class _Page(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words = ""
        self.feed(page)

    def handle_starttag(self, tag, attributes) -> None:
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data) -> None:
        self.words += data


@pytest.fixture
def evil_report(result, report) -> Report:
    data = DataEntry(role="evaluation", name=EVIL, sha256=EVIL, licence=EVIL, detail=EVIL)
    step = StepEntry(method=EVIL, summary=EVIL, options={EVIL: EVIL}, notes=(EVIL,))
    full = report(
        result(),
        result(size=500),
        title=EVIL,
        recipe_name=EVIL,
        recipe={EVIL: EVIL},
        command=EVIL,
        started=EVIL,
        steps=(step,),
    )
    return with_findings(full.model_copy(update={"data": (data,)}))


def test_everything_from_outside_is_escaped_in_html(evil_report, result) -> None:
    page = _Page(render_html(evil_report))
    assert not {"script", "img", "link", "iframe", "object"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name == "src"]
    assert page.words.count(EVIL) >= 8
    comparison = compare([Entry(EVIL, result()), Entry("b", result(4.0, size=500))])
    shown = _Page(comparison.html())
    assert "script" not in shown.tags and EVIL in shown.words


def test_everything_from_outside_is_escaped_in_markdown(evil_report) -> None:
    lines = render_markdown(evil_report).splitlines()
    for line in lines:
        if line.startswith("|"):
            cells = line.replace("\\|", "").split("|")
            assert "<" not in line.replace("\\<", "")
            assert len(cells) in (6, 7)
    assert f"# {EVIL[0]}" not in lines


def test_page_is_self_contained_and_fits_phones_and_dark_rooms(result, report) -> None:
    page = render_html(with_findings(report(result(), result(size=500))))
    assert "://" not in page and "url(" not in page and "<script" not in page
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    assert page.count("<svg") == 1  # only the size differs


def test_files_round_trip(result, report, tmp_path) -> None:
    full = with_findings(report(result(accuracy=0.5), result(accuracy=0.4)))
    paths = write_report(full, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]
    assert load_report(tmp_path) == load_report(paths["json"]) == full
    with pytest.raises(CompressError, match=r"a report\.json"):
        load_report(tmp_path / "nowhere")
    paths["json"].write_text('{"schema_version": 2}')
    with pytest.raises(CompressError, match="schema_version"):
        load_report(tmp_path)


def test_terminal_prints_brackets_as_they_are(result, report) -> None:
    from rich.console import Console

    stream = io.StringIO()
    full = with_findings(report(result(), result(speedup=(0.98, 1.01, 1.03)), title="[bold]a[/]"))
    print_report(full, Console(file=stream, width=120))
    shown = stream.getvalue()
    assert "[0.98, 1.03]" in shown and "[bold]a[/]" in shown
    assert "before" in shown and "Perplexity" in shown


def test_report_with_numbers_that_are_none(result, report, tmp_path) -> None:
    paths = write_report(with_findings(report(result(), result(size=500))), tmp_path)
    data = json.loads(paths["json"].read_text())
    data["after"]["perplexity"]["perplexity"] = float("nan")
    paths["json"].write_text(json.dumps(data))
    with pytest.raises(CompressError, match="after.perplexity.perplexity"):
        load_report(tmp_path)
    paths["json"].write_text("[" * 100_000)
    with pytest.raises(CompressError, match="report.json of this version"):
        load_report(tmp_path)
    with pytest.raises(CompressError, match="to write"):
        write_report(report(result()), tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("before", "after", "tone", "words"),
    [
        ({"size": 3200}, {"nll": 3.24, "size": 1000, "speedup": (0.99, 1.0, 1.01)}, "warning",
         "Outside the tolerance: perplexity +27 %, 3.2x smaller, no faster."),
        ({}, {"size": 500, "macs": 250, "speedup": (1.9, 2.0, 2.1)}, "good",
         "Within tolerance: perplexity +0 %, 2x smaller, 2x faster."),
        ({}, {"nll": 3.05, "wobble": 0.5}, "note", "Too coarsely measured"),
        ({}, {"nll": 9.0}, "warning", "perplexity 403.4 times as high, no smaller."),
    ],
)  # fmt: skip
def test_the_verdict_says_it_in_a_sentence(result, report, before, after, tone, words) -> None:
    full = report(result(**before), result(**after))
    found = verdict(full)
    assert found.tone == tone and words in found.text
    assert found.text in render_markdown(full) and f'class="verdict {tone}"' in render_html(full)
    assert f'<li class="{tone}"><span class="name">Perplexity' in render_html(full)
    assert verdict(report()) is None


def test_the_verdict_is_of_the_worst_quality(result, report, masked) -> None:
    fine = {"size": 500, "macs": 250}
    lost = verdict(report(result(accuracy=0.7), result(accuracy=0.5, **fine)))
    assert lost.tone == "warning"
    assert lost.text.startswith("Outside the tolerance: piqa acc 0.7000 to 0.5000, 2x smaller")
    coarse = verdict(report(result(accuracy=0.7), result(accuracy=0.695, **fine)))
    assert coarse.tone == "note" and ": piqa acc" in coarse.text
    both = verdict(report(result(accuracy=0.7), result(9.0, accuracy=0.5)))
    assert "perplexity 403.4 times as high, piqa acc 0.7000 to 0.5000, " in both.text
    # The first quality, masked perplexity, has not changed.
    dropped = verdict(report(masked(0.87), masked(0.76)))
    assert dropped.tone == "warning" and "tolerance: masked accuracy -11 points" in dropped.text


def test_options_are_written_as_a_recipe_writes_them() -> None:
    assert written_options({"pattern": "2:4", "include": ["*"], "rank": None, "sym": True}) == (
        "pattern: '2:4', include: ['*'], sym: true"
    )
