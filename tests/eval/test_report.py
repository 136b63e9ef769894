"""Reports: what they say, that they escape, that they survive JSON."""

from __future__ import annotations

import io
import json
import math
import sys
from html.parser import HTMLParser

import pytest

from compress.errors import CompressError
from compress.eval.cost import CostResult, Macs, PairedLatency, PeakMemory, Size
from compress.eval.cost.latency import PairedTimes
from compress.eval.quality.masked import MaskedResult
from compress.eval.quality.perplexity import PerplexityResult
from compress.eval.quality.tasks import Metric, TaskResult, TasksResult
from compress.eval.report import (
    DataEntry,
    Environment,
    Report,
    RunInfo,
    StepEntry,
    findings,
    load_report,
    print_report,
    render_html,
    render_markdown,
    with_findings,
    write_report,
)
from compress.eval.report.compare import Entry, compare
from compress.eval.report.plot import Point, scatter
from compress.eval.report.rows import cost_rows, number, quality_ratio, quality_rows, ratio
from compress.eval.spec import EvaluationResult, EvaluationSpec

EVIL = '<script>alert("x")</script>&<img src=x onerror=alert(1)>|`'


def result(
    nll: float = 3.0,
    *,
    size: int = 1000,
    macs: int = 500,
    accuracy: float | None = None,
    speedup: tuple[float, float, float] | None = None,
    text: str = "t",
    wobble: float = 0.0,
) -> EvaluationResult:
    windows = [nll + 0.1 * math.sin(i) + wobble * math.cos(3 * i) for i in range(12)]
    mean = sum(windows) / 12
    timed = None
    if speedup:
        low, middle, high = speedup
        pair = PairedTimes(
            before=middle,
            after=1.0,
            speedup=middle,
            interval=(low, high),
            before_seconds=[middle],
            after_seconds=[1.0],
        )
        timed = PairedLatency(
            prefill=pair,
            decode=None,
            prefill_tokens=8,
            decode_tokens=0,
            repeats=3,
            threads=1,
            device="cpu",
            dtype=("float32", "float32"),
        )
    tasks = None
    if accuracy is not None:
        metric = Metric(value=accuracy, stderr=0.01, higher_is_better=True)
        piqa = TaskResult(
            metrics={"acc": metric},
            samples=100,
            num_fewshot=0,
            version="1",
            source="hub",
            files={},
        )
        tasks = TasksResult(tasks={"piqa": piqa}, limit=None, batch_size=1, lm_eval="0")
    counts = Size(
        parameters=100,
        nonzero_parameters=90,
        parameters_without_embeddings=80,
        block_weights=70,
        nonzero_block_weights=60,
        checkpoint_bytes=size,
        block_bytes=size // 2,
        bits_per_weight=4.5,
    )
    return EvaluationResult(
        model_class="LlamaForCausalLM",
        kind="causal",
        dtype="float32",
        device="cpu",
        spec=EvaluationSpec(),
        tokens_sha256=text,
        perplexity=PerplexityResult(
            perplexity=math.exp(mean),
            interval=(math.exp(mean - 0.1), math.exp(mean + 0.1)),
            nll=mean,
            nll_stderr=0.05,
            tokens=1200,
            window=101,
            stride=101,
            window_nll=windows,
        ),
        tasks=tasks,
        cost=CostResult(
            size=counts,
            macs=Macs(per_token=macs, head=10, per_token_and_position=1, context=64),
            memory=PeakMemory(libraries=1, load=2, prefill=3, tokens=8),
        ),
        latency=timed,
        seconds={},
    )


def masked(accuracy: float, wobble: float = 0.0) -> EvaluationResult:
    scores = MaskedResult(
        pll=-1.0,
        pll_stderr=0.1,
        pseudo_perplexity=math.e,
        pseudo_perplexity_interval=None,
        pll_positions=10,
        accuracy=accuracy,
        accuracy_stderr=0.04,
        cross_entropy=1.0,
        cross_entropy_stderr=0.1,
        masked_positions=240,
        mask_fraction=0.15,
        window=128,
        seed=0,
        window_nll=[1.0] * 12,
        window_accuracy=[accuracy + wobble * math.cos(i) for i in range(12)],
        window_tokens=[20] * 12,
    )
    return result().model_copy(update={"perplexity": None, "kind": "masked", "masked": scores})


def report(before=None, after=None, **run) -> Report:
    steps = run.pop("steps", ())
    title = run.pop("title", "a run")
    return Report(
        title=title,
        run=RunInfo(model="m", **run),
        steps=steps,
        before=before,
        after=after or result(),
        environment=Environment(
            platform="Linux", cpu="a cpu", cores=2, threads=1, memory_bytes=10**9, versions={}
        ),
    )


def said(*args, **kwargs) -> str:
    return "\n".join(f"{f.level}: {f.text}" for f in findings(report(*args, **kwargs)))


class TestFindings:
    def test_trust_remote_code(self) -> None:
        assert said(trust_remote_code=True).startswith("warning: trust_remote_code was on")
        assert "trust_remote_code" not in said()

    def test_a_speed_whose_interval_includes_one_is_neither_good_nor_bad(self) -> None:
        text = said(result(), result(speedup=(0.98, 1.01, 1.03)))
        assert "note: No measurable change of prefill latency: 1.01x [0.98, 1.03]" in text
        slightly = said(result(), result(macs=400, speedup=(0.98, 0.99, 0.995)))
        assert "note: Prefill speed is 0.99x [0.98, 0.99], not clearly more than 5 %" in slightly

    def test_faster_and_slower_and_what_the_work_predicts(self) -> None:
        faster = said(result(macs=1000), result(macs=800, speedup=(1.1, 1.2, 1.3)))
        assert "good: Prefill is 1.20x [1.10, 1.30] as fast" in faster
        # 8 tokens whose logits are all computed, each with the 4.5 positions that it sees.
        assert f"predict {(8 * 936 + 36) / (8 * 736 + 36):.2f}x" in faster
        slower = said(result(), result(speedup=(0.7, 0.8, 0.9)))
        assert "warning: Prefill is slower: 0.80x" in slower

    def test_expected_figures_are_reproduced_or_not(self) -> None:
        def run(name: str, value: float) -> str:
            recipe = {"expected": {name: {"value": value, "within": 0.5}, "dense": 5.12}}
            return said(result(2.0), result(3.0, accuracy=0.7), recipe=recipe)

        perplexity = math.exp(result(3.0).perplexity.nll)
        near = run("perplexity", perplexity + 0.4)
        assert "good: Expected perplexity" in near and f"reproduced ({number(perplexity)})" in near
        far = run("perplexity", perplexity + 0.6)
        assert f"NOT reproduced: {number(perplexity)}" in far and "warning: Expected" in far
        assert "good: Expected" in run("original.perplexity", math.exp(2.0))
        assert "good: Expected" in run("tasks.piqa.acc", 0.7)
        assert "warning: Expected masked_accuracy" in run("masked_accuracy", 0.7)

    def test_dense_zeros_earn_no_praise(self) -> None:
        zeros = StepEntry(method="x", options={"pattern": "2:4"}, writes=("zeros",))
        both = (result(), result(speedup=(1.06, 1.08, 1.1)))
        text = said(*both, steps=(zeros,))
        assert "note: Prefill was 1.08x" in text and "the same products" in text
        rows = {row.name: row for row in cost_rows(report(*both, steps=(zeros,)))}
        assert rows["Prefill, 8 tokens"].better == rows["Non-zero parameters"].better == 0

    def test_a_result_is_held_against_what_was_downloaded(self) -> None:
        shipped = {"source_bytes": 400, "source_format": "GGUF"}
        larger = report(result(), result(size=500), **shipped)
        assert any(
            f.level == "warning" and "400 B (GGUF)" in f.text and "larger than its source" in f.text
            for f in findings(larger)
        )
        rows = {row.name: row for row in cost_rows(larger)}
        assert rows["Checkpoint"].better == 0
        assert rows["Checkpoint against its source"].better == -1
        assert "400 B" in render_html(larger) and "400 B" in render_markdown(larger)
        assert "good: The source was 400 B" in said(result(), result(size=200), **shipped)

    def test_zeros_and_precision_say_what_they_do_not_bring(self) -> None:
        pattern = StepEntry(method="x", options={"pattern": "2:4"}, writes=("zeros",))
        scattered = StepEntry(method="x", options={"sparsity": 0.5}, writes=("zeros",))
        rounded = StepEntry(method="y", writes=("precision",))
        assert "2:4 zeros bring no speed on a CPU or in vLLM today" in said(steps=(pattern,))
        assert "Scattered zeros bring no speed" in said(steps=(scattered,))
        assert "4.50 bits per weight on disk) are decompressed" in said(steps=(rounded,))
        assert "zeros" not in said(steps=(rounded,))
        assert "no smaller" in said(result(), result(), steps=(scattered,))
        assert "good: The checkpoint is 2.00x smaller" in said(result(), result(size=500))

    @pytest.mark.parametrize(
        ("nll", "wobble", "level", "verdict"),
        [
            (3.0, 0.0, "good", "within the tolerance of 5 %"),
            (3.24, 0.0, "warning", "outside the tolerance of 5 %"),
            (3.02, 0.3, "note", "too coarsely to say whether that is within"),
            (2.9, 0.0, "good", "better than the original"),
            (5.0, 0.0, "warning", "The model is damaged"),
        ],
    )
    def test_quality(self, nll, wobble, level, verdict) -> None:
        text = said(result(3.0), result(nll, wobble=wobble))
        assert f"{level}: Perplexity is" in text and verdict in text
        row = quality_rows(report(result(3.0), result(nll, wobble=wobble)))[0]
        assert row.better == {"good": 1, "note": 0, "warning": -1}[level]

    def test_the_tolerance_is_the_recipes(self) -> None:
        spec = EvaluationSpec(tolerance={"perplexity": 0.3})
        after = result(3.24).model_copy(update={"spec": spec})
        assert "good: Perplexity is 1.27x" in said(result(3.0), after)

    def test_no_quality_across_two_texts(self) -> None:
        assert "Perplexity is" not in said(result(), result(5.0, text="another"))

    def test_tasks_beyond_their_noise(self) -> None:
        worse = said(result(accuracy=0.7), result(accuracy=0.6))
        assert "warning: piqa acc: outside the tolerance of 1 point of accuracy." in worse
        close = said(result(accuracy=0.7), result(accuracy=0.69))
        assert "note: piqa acc: measured too coarsely" in close

    def test_a_drop_of_masked_accuracy_is_not_praised(self) -> None:
        before, after = (masked(a) for a in (0.87, 0.76))
        assert "warning: Masked accuracy went from 0.8700 to 0.7600" in said(before, after)
        coarse = said(masked(0.87, wobble=0.5), masked(0.76))
        assert "note: Masked accuracy went from" in coarse and "good: Masked acc" not in coarse
        assert "good: Masked accuracy" in said(before, before)


def test_the_ratio_is_paired_by_window() -> None:
    before, after = result(3.0), result(3.2)
    factor, (low, high) = quality_ratio(before, after)
    assert factor == pytest.approx(math.exp(0.2))
    # Both scattered alike, so the difference does not scatter at all.
    assert high - low < 1e-6
    assert quality_ratio(before, result(text="another")) is None


def test_the_ratio_weighs_windows_by_their_tokens() -> None:
    before, after = (
        scored.model_copy(
            update={"perplexity": scored.perplexity.model_copy(
                update={"window_nll": nll, "window_tokens": [300, 100]})}
        )
        for scored, nll in ((result(), [3.0, 3.0]), (result(), [3.0, 3.4]))
    )  # fmt: skip
    assert quality_ratio(before, after)[0] == pytest.approx(math.exp(0.1))


def test_rows() -> None:
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


def evil_report() -> Report:
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


def test_everything_from_outside_is_escaped_in_html() -> None:
    page = _Page(render_html(evil_report()))
    assert not {"script", "img", "link", "iframe", "object"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name == "src"]
    assert page.words.count(EVIL) >= 8
    comparison = compare([Entry(EVIL, result()), Entry("b", result(4.0, size=500))])
    shown = _Page(comparison.html())
    assert "script" not in shown.tags and EVIL in shown.words


def test_everything_from_outside_is_escaped_in_markdown() -> None:
    lines = render_markdown(evil_report()).splitlines()
    for line in lines:
        if line.startswith("|"):
            cells = line.replace("\\|", "").split("|")
            assert "<" not in line.replace("\\<", "")
            assert len(cells) in (6, 7)
    assert f"# {EVIL[0]}" not in lines


def test_page_is_self_contained_and_fits_phones_and_dark_rooms() -> None:
    page = render_html(with_findings(report(result(), result(size=500))))
    assert "://" not in page and "url(" not in page and "<script" not in page
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    assert page.count("<svg") == 1  # only the size differs


def test_files_round_trip(tmp_path) -> None:
    full = with_findings(report(result(accuracy=0.5), result(accuracy=0.4)))
    paths = write_report(full, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]
    assert load_report(tmp_path) == load_report(paths["json"]) == full
    with pytest.raises(CompressError, match=r"a report\.json"):
        load_report(tmp_path / "nowhere")
    paths["json"].write_text('{"schema_version": 2}')
    with pytest.raises(CompressError, match="schema_version"):
        load_report(tmp_path)


def test_terminal_prints_brackets_as_they_are() -> None:
    from rich.console import Console

    stream = io.StringIO()
    full = with_findings(report(result(), result(speedup=(0.98, 1.01, 1.03)), title="[bold]a[/]"))
    print_report(full, Console(file=stream, width=120))
    shown = stream.getvalue()
    assert "[0.98, 1.03]" in shown and "[bold]a[/]" in shown
    assert "before" in shown and "Perplexity" in shown


class TestCompare:
    def test_frontier_keeps_what_nothing_beats(self) -> None:
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

    def test_reports_share_their_original_and_names_stay_apart(self) -> None:
        found = compare([report(result(), result(4.0)), report(result(), result(5.0))])
        assert [e.name for e in found.entries] == ["original (m)", "a run", "a run (2)"]

    def test_accuracy_counts_upwards(self) -> None:
        entries = [
            Entry(name, result(accuracy=a, size=s).model_copy(update={"perplexity": None}))
            for name, a, s in (("a", 0.7, 1000), ("b", 0.6, 1000))
        ]
        assert compare(entries).frontier["checkpoint on disk"] == {"a"}

    def test_refusals(self) -> None:
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


def test_report_with_numbers_that_are_none(tmp_path) -> None:
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


@pytest.mark.parametrize("largest", [math.exp(700), sys.float_info.max])
def test_a_ruined_model_beside_a_sound_one_is_drawn(largest) -> None:
    points = [Point("a", 1.0, 10.0), Point("b", 2.0, largest)]
    page = scatter(points, "size", "perplexity", str, str)
    assert "nan" not in page and "inf" not in page and page.count("<text") < 40
