"""The parts of the benchmarks that decide what a figure means: rows, tables, measuring, models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from compress.errors import CompressError
from compress.eval.bench import provenance, runs
from compress.eval.bench.llama import write_llama
from compress.eval.bench.memory import parameters
from compress.eval.bench.process import Usage, measure
from compress.eval.bench.resume import kill_within
from compress.eval.bench.rows import Row, number, over_seeds, read_rows, write_rows
from compress.eval.bench.runs import digests
from compress.eval.bench.speedup import prefill_macs
from compress.eval.bench.tables import render
from compress.eval.bench.vib.outcomes import equal_accuracy, share_at


def row(figure: str, value: float = 1.0, **fields) -> Row:
    return Row(
        **{
            "figure": figure, "value": value, "unit": "s", "op": "<=", "bar": 2.0, "peer": None,
            "command": "python -m compress.eval.bench.x", **fields,
        }
    )  # fmt: skip


def test_rows_replace_their_figure_and_keep_the_others(tmp_path):
    path = tmp_path / "results" / "spine.json"
    write_rows(path, [row("b", 1), row("c", 2)])
    merged = write_rows(path, [row("b", 7), row("a", 3)])
    assert [(r.figure, r.value) for r in merged] == [("a", 3), ("b", 7), ("c", 2)]
    assert read_rows(path) == merged
    assert [p.name for p in path.parent.iterdir()] == ["spine.json"]
    assert all(set(entry) == set(Row.model_fields) for entry in json.loads(path.read_text()))
    assert all(r.processor and r.commit == provenance.commit() for r in merged)


def test_rows_of_older_files_are_read_and_not_given_a_commit_that_is_not_theirs(tmp_path):
    path = tmp_path / "spine.json"
    fields = ("figure", "value", "unit", "op", "bar", "peer", "command")
    path.write_text(json.dumps([row("old").model_dump(include=set(fields))]))
    old, new = sorted(write_rows(path, [row("new")]), key=lambda r: r.figure, reverse=True)
    assert old.commit is None and old.processor is None and new.processor is not None


def test_figures_that_a_benchmark_no_longer_measures_disappear(tmp_path):
    path = tmp_path / "spine.json"
    write_rows(path, [row("a"), row("b"), row("c", command="make quickstart")])
    kept = write_rows(path, [row("a", command=row("a").command + " --data-root DIR")], whole=True)
    assert [r.figure for r in kept] == ["a", "c"]


def test_a_row_of_seeds_shows_median_and_range(tmp_path):
    write_rows(tmp_path / "s.json", [row("a", **over_seeds([53.0, 51.9, 52.63]), bar=53)])
    table = render("<!-- results:s -->\n<!-- /results -->\n", tmp_path)
    assert "| 52.63 (51.90-53) s" in table and "3 seeds" in table
    with pytest.raises(ValueError, match="range and seeds"):
        row("a", range=(1, 2))


def test_a_figure_is_marked_when_its_code_has_changed_and_not_for_words(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ("-c", "user.name=t", "-c", "user.email=t")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def changed(measured_by):
        provenance.code_digest.cache_clear()
        provenance._differs.cache_clear()
        return provenance.changed_since(measured_by, "python -m other")

    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    code = tmp_path / "compress" / "code.py"
    code.parent.mkdir()
    (tmp_path / "eval").mkdir()
    code.write_text("def f():\n    return 1\n")
    git("init"), git("add", "."), git("commit", "-m", "a")
    first = git("rev-parse", "--short", "HEAD")
    assert not changed(first) and changed(None) and changed("0123456789")
    code.write_text(
        'CODE = ("compress",)\n\n\ndef f():\n    """One."""\n    return 1  # the same\n'
    )
    assert not changed(first)
    code.write_text("def f():\n    return 2\n")
    provenance.code_digest.cache_clear()
    dirty = f"{first}-dirty-{provenance.code_key()}"
    assert changed(first) and not changed(dirty)
    git("commit", "-am", "b")
    assert changed(first) and not changed(dirty)
    code.write_text("def f():\n    return 3\n")
    assert changed(dirty)
    provenance.code_digest.cache_clear()
    provenance._differs.cache_clear()


def test_a_finished_run_is_taken_only_for_the_code_and_recipe_that_made_it(tmp_path, monkeypatch):
    made = []

    def carry_out(command, log):
        out = Path(command[command.index("--out") + 1])
        out.mkdir()
        (out / "report.json").write_text("{}")
        made.append(out)
        return Usage(seconds=1.0, cpu_seconds=2.0, peak_bytes=3)

    monkeypatch.setattr(runs, "measure", carry_out)
    first = runs.run_once(tmp_path, "a", "seed: 0\n")
    assert runs.run_usage(first) == Usage(seconds=1.0, cpu_seconds=2.0, peak_bytes=3)
    assert runs.run_once(tmp_path, "a", "seed: 0  # the same\n") == first and len(made) == 1
    assert runs.run_once(tmp_path, "a", "seed: 1\n") != first
    monkeypatch.setattr(runs, "code_key", lambda: "another")
    assert runs.run_once(tmp_path, "a", "seed: 0\n") != first and len(made) == 3


@pytest.mark.parametrize("content", ["{", '[{"figure": "a"}]', '{"figure": "a"}'])
def test_a_file_that_holds_no_rows_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "spine.json"
    path.write_text(content)
    with pytest.raises(CompressError, match="list of rows"):
        write_rows(path, [row("a")])
    assert path.read_text() == content


def test_a_figure_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "spine.json"
    path.write_text(json.dumps([row("a").model_dump()] * 2))
    with pytest.raises(CompressError, match="more than once"):
        read_rows(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_figure_is_a_finite_number(value):
    with pytest.raises(ValueError):
        row("a", value)


def test_a_bar_is_met_on_its_good_side_and_at_the_bar_itself():
    assert row("a", 2).met and row("a", 2, op=">=").met
    assert row("a", 2.1).met is False and row("a", 1.9, op=">=").met is False
    assert row("a", bar=None).met is None


def test_tables_fill_the_markers_repeatedly_and_show_what_missed_its_bar(tmp_path):
    write_rows(tmp_path / "spine.json", [row("quick", 1), row("slow|er", 3), row("note", bar=None)])
    text = "a\n<!-- results:spine -->\nold\n<!-- /results -->\nb\n"
    once = render(text, tmp_path)
    assert "old" not in once and once.startswith("a\n") and once.endswith("b\n")
    lines = {line.split(" | ")[0].strip("| "): line for line in once.splitlines() if "|" in line}
    assert "yes" in lines["quick"] and "**no**" in lines["slow\\|er"]
    assert "yes" not in lines["note"] and "no*" not in lines["note"]
    assert render(once, tmp_path) == once
    bars = render(text.replace("spine -->", "spine bars -->"), tmp_path)
    assert "quick" in bars and "note" not in bars
    assert "Not measured yet" in render(text.replace("spine", "other"), tmp_path)


def test_a_pivot_has_a_line_a_thing_and_a_column_a_measure(tmp_path):
    names = ("m, b: loss", "m, b: hits, 16 steps", "m, dense: hits, 8 steps", "m, dense: loss",
             "other, b: loss")  # fmt: skip
    write_rows(tmp_path / "a.json", [row(name, n) for n, name in enumerate(names, 1)])
    table = render("<!-- results:a pivot:m -->\n<!-- /results -->\n", tmp_path).splitlines()
    assert table[1] == "| m | hits, 8 steps (s) | hits, 16 steps (s) | loss (s) |"
    assert table[3:5] == ["| dense | 3 |  | 4 |", "| b |  | 2 | 1 |"]


@pytest.mark.parametrize("text", ["<!-- results:a -->\n", "<!-- /results -->\n"])
def test_half_a_marker_is_refused(tmp_path, text):
    with pytest.raises(CompressError, match="pairs"):
        render(text, tmp_path)


def test_numbers_have_four_digits():
    shown = [number(v) for v in (10, 0.61234, 23.9412, 152.04, 496.21, 1234.5, 2.5e-7, 0.9999999)]
    assert shown == ["10", "0.6123", "23.94", "152.0", "496.2", "1234", "2.50e-07", "1.0000"]


def test_a_process_is_measured_from_outside_whatever_its_parent_holds(tmp_path):
    ballast = bytearray(400 * 2**20)
    code = "import time; x = bytearray(150 * 2**20); time.sleep(0.3)"
    usage = measure([sys.executable, "-I", "-c", code], tmp_path / "log")
    assert len(ballast) > 300 * 2**20
    assert 150 * 2**20 < usage.peak_bytes < 300 * 2**20
    assert usage.seconds > 0.3 and usage.cpu_seconds < usage.seconds + 1


def test_a_process_that_fails_shows_the_end_of_its_output(tmp_path):
    with pytest.raises(CompressError, match="what went wrong"):
        measure([sys.executable, "-I", "-c", "raise SystemExit('what went wrong')"], tmp_path / "l")


def test_a_kill_hits_a_running_process_and_says_when_it_was_over(tmp_path):
    slow = [sys.executable, "-I", "-c", "import time; time.sleep(60)"]
    assert kill_within(slow, tmp_path / "log", 0.2)
    assert not kill_within([sys.executable, "-I", "-c", ""], tmp_path / "log", 30)


def tiny(**fields) -> LlamaConfig:
    return LlamaConfig(
        **{
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 256,
            "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
            **fields,
        }
    )  # fmt: skip


def test_a_random_llama_loads_and_is_the_same_for_the_same_seed(tmp_path):
    folder = write_llama(tmp_path / "a", tiny(), torch.bfloat16, seed=1)
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert matrices == parameters(model.config)
    again = write_llama(tmp_path / "b", tiny(), torch.bfloat16, seed=1)
    other = write_llama(tmp_path / "c", tiny(), torch.bfloat16, seed=2)
    assert digests(folder) == digests(again) != digests(other)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Grüße!", add_special_tokens=False)["input_ids"]
    assert len(ids) == len("Grüße!".encode()) and tokenizer.decode(ids) == "Grüße!"


def test_macs_of_a_prefill_are_those_of_its_products():
    from transformers import LlamaForCausalLM

    config = tiny()
    model = LlamaForCausalLM(config)
    tokens, hidden, head = 20, 32, 32 * 256
    block = hidden * (2 * hidden + 2 * 16 + 3 * 64)
    attention = 3 * 2 * hidden * tokens * (tokens + 1) // 2
    assert prefill_macs(model, tokens) == tokens * 3 * block + head + attention


def test_a_row_says_that_local_data_were_used(tmp_path) -> None:
    from argparse import Namespace

    from compress.eval.bench.options import publish

    made = Row(
        figure="a",
        value=1,
        unit="",
        op="<=",
        bar=None,
        peer=None,
        command="python -m compress.eval.bench.x",
    )
    for root, command in (
        (None, "python -m compress.eval.bench.x"),
        (tmp_path, "python -m compress.eval.bench.x --data-root DIR"),
    ):
        options = Namespace(data_root=root, results=tmp_path / "rows.json", smoke=False)
        publish(options, tmp_path, [made], "any")
        assert [row.command for row in read_rows(options.results)] == [command]


def test_curves_are_compared_at_equal_accuracy():
    curve = [(50.0, 90.0), (0.0, 92.0), (30.0, 91.5), (70.0, 86.0)]
    found = [share_at(curve, accuracy) for accuracy in (92.5, 92.0, 90.75, 88.0, 80.0)]
    assert found == [0, 0, 40, 60, 70]
    # A dip does not end a curve: what can go is the most with which the accuracy is left.
    assert share_at([(0, 92), (30, 89), (50, 90), (70, 80)], 90) == 50
    curves = {"full": curve[0:1], "best": [(30.0, 90.0)], "worst": [(30.0, 80.0)], "none": []}
    rows = {row.figure: row for row in equal_accuracy("x", "T", 92.0, curves)}
    ratio = rows["T, 2 points below dense: parameters removed, full / best other"]
    assert ratio.value == pytest.approx(50 / 30) and ratio.met
    assert equal_accuracy("x", "T", 92.0, {"best": curves["best"]}) == []
