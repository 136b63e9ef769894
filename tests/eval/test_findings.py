"""Findings: a sentence for what a run gained, lost or did not change measurably."""

from __future__ import annotations

import math

import pytest

from compress.eval.report import StepEntry, findings, render_html, render_markdown
from compress.eval.report.rows import cost_rows, number, quality_rows
from compress.eval.report.verdict import verdict
from compress.eval.spec import EvaluationSpec, RuntimeResult


@pytest.fixture
def said(report):
    """``said(before, after, …)``: the findings of such a report, a line each."""

    def say(*args, **kwargs) -> str:
        return "\n".join(f"{f.level}: {f.text}" for f in findings(report(*args, **kwargs)))

    return say


def test_trust_remote_code(said) -> None:
    assert said(trust_remote_code=True).startswith("warning: trust_remote_code was on")
    assert "trust_remote_code" not in said()


def test_a_speed_whose_interval_includes_one_is_neither_good_nor_bad(said, result) -> None:
    text = said(result(), result(speedup=(0.98, 1.01, 1.03)))
    assert "note: No measurable change of prefill latency: 1.01x [0.98, 1.03]" in text
    slightly = said(result(), result(macs=400, speedup=(0.98, 0.99, 0.995)))
    assert "note: Prefill speed is 0.99x [0.98, 0.99], not clearly more than 5 %" in slightly


def test_faster_and_slower_and_what_the_work_predicts(said, result) -> None:
    faster = said(result(macs=1000), result(macs=800, speedup=(1.1, 1.2, 1.3)))
    assert "good: Prefill is 1.20x [1.10, 1.30] as fast" in faster
    # 8 tokens whose logits are all computed, each with the 4.5 positions that it sees.
    assert f"predict {(8 * 936 + 36) / (8 * 736 + 36):.2f}x" in faster
    slower = said(result(), result(speedup=(0.7, 0.8, 0.9)))
    assert "warning: Prefill is slower: 0.80x" in slower


def test_expected_figures_are_reproduced_or_not(said, result) -> None:
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


def test_dense_zeros_earn_no_praise(said, result, report) -> None:
    zeros = StepEntry(method="x", options={"pattern": "2:4"}, writes=("zeros",))
    both = (result(), result(speedup=(1.06, 1.08, 1.1)))
    text = said(*both, steps=(zeros,))
    assert "note: Prefill was 1.08x" in text and "the same products" in text
    rows = {row.name: row for row in cost_rows(report(*both, steps=(zeros,)))}
    assert rows["Prefill, 8 tokens"].better == rows["Non-zero parameters"].better == 0


def test_products_of_packed_weights_are_others(said, result, report) -> None:
    rounded = StepEntry(method="y", writes=("precision",))
    before, packed = result(), result(speedup=(1.06, 1.08, 1.1))
    cost = packed.cost.model_copy(update={"execution": "packed bits in 4 of 5 linears on cpu"})
    packed = packed.model_copy(update={"cost": cost})
    text = said(before, packed, steps=(rounded,))
    assert "good: Prefill is 1.08x" in text and "the same products" not in text
    assert "stay packed" in text and "decompressed by stock" not in text


def test_a_result_is_held_against_what_was_downloaded(said, result, report) -> None:
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


def test_zeros_and_precision_say_what_they_do_not_bring(said, result) -> None:
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
def test_quality(said, result, report, nll, wobble, level, verdict) -> None:
    text = said(result(3.0), result(nll, wobble=wobble))
    assert f"{level}: Perplexity is" in text and verdict in text
    row = quality_rows(report(result(3.0), result(nll, wobble=wobble)))[0]
    assert row.better == {"good": 1, "note": 0, "warning": -1}[level]


def test_the_tolerance_is_the_recipes(said, result) -> None:
    spec = EvaluationSpec(tolerance={"perplexity": 0.3})
    after = result(3.24).model_copy(update={"spec": spec})
    assert "good: Perplexity is 1.27x" in said(result(3.0), after)


def test_no_quality_across_two_texts(said, result) -> None:
    assert "Perplexity is" not in said(result(), result(5.0, text="another"))


def test_tasks_beyond_their_noise(said, result) -> None:
    worse = said(result(accuracy=0.7), result(accuracy=0.6))
    assert "warning: piqa acc: outside the tolerance of 1 point of accuracy." in worse
    close = said(result(accuracy=0.7), result(accuracy=0.69))
    assert "note: piqa acc: measured too coarsely" in close


def test_a_task_without_scatter_is_judged_by_its_documents(said, result) -> None:
    def right(samples: int):
        one = result(accuracy=1.0)
        metric = one.tasks.tasks["piqa"].metrics["acc"].model_copy(update={"stderr": 0.0})
        task = one.tasks.tasks["piqa"].model_copy(
            update={"metrics": {"acc": metric}, "samples": samples}
        )
        tasks = one.tasks.model_copy(update={"tasks": {"piqa": task}})
        return one.model_copy(update={"tasks": tasks})

    assert "note: piqa acc: measured too coarsely" in said(right(5), right(5))
    assert "good: piqa acc: within" in said(right(5000), right(5000))


def test_a_drop_of_masked_accuracy_is_not_praised(said, masked) -> None:
    before, after = (masked(a) for a in (0.87, 0.76))
    assert "warning: Masked accuracy went from 0.8700 to 0.7600" in said(before, after)
    coarse = said(masked(0.87, wobble=0.5), masked(0.76))
    assert "note: Masked accuracy went from" in coarse and "good: Masked acc" not in coarse
    assert "good: Masked accuracy" in said(before, before)
    few = before.masked.model_copy(update={"window_tokens": [2] * 12})
    few = before.model_copy(update={"masked": few})
    assert "note: Masked accuracy" in said(few, few)


def test_runtimes_say_what_the_runtime_does_and_what_the_compression(said, result, report) -> None:
    after = result(3.02, size=350, speedup=(0.7, 0.8, 0.9))
    fast, own = (result(speedup=s).latency for s in ((7.0, 8.0, 9.0), (0.99, 1.0, 1.01)))
    there = RuntimeResult(
        runtime="onnx", execution="onnxruntime 1", bytes=300, latency=fast, own_latency=own,
        perplexity=result(3.04).perplexity, memory=after.cost.memory,
    )  # fmt: skip
    after = after.model_copy(update={"runtimes": (there,)})
    shipped = {"source_bytes": 400, "source_format": "GGUF"}
    text = said(result(), after, **shipped)
    assert (
        "good: In onnxruntime, prefill is 8.00x [7.00, 9.00] as fast as the original in "
        "transformers and 1.00x [0.99, 1.01] as fast as the original in onnxruntime, so "
        "compression gains nothing there." in text
    )
    assert "warning: Perplexity in onnxruntime is 1.02x that of the same result" in text
    assert "good: Exported for onnxruntime it takes 300 B, all files, of the 400 B" in text
    assert "note: What to run the result with: to read long inputs, onnxruntime;" in text
    assert "1.25x slower, 8x faster in onnxruntime." in verdict(report(result(), after)).text
    for form in (render_html, render_markdown):
        shown = form(report(result(), after, **shipped))
        assert "the original in transformers" in shown and "8.00x" in shown
    assert "Runtimes" not in render_html(report(result(), result()))
