"""Runs from start to report: what is left, what is refused, what is not touched."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

import compress
from compress.errors import CompressError
from compress.eval.report import Report

STEPS = ({"method": "ffn_width", "share": 0.25}, {"method": "gptq", "group_size": 16})


@pytest.fixture(scope="module")
def finished(checkpoint, text, helpers, tmp_path_factory):
    """A complete run of two steps, its recipe, and the folder around it before and after."""
    home = tmp_path_factory.mktemp("home")
    recipe = helpers.recipe(
        checkpoint("llama"), STEPS, text, evaluation=helpers.evaluation(text), seed=5,
        description="for <script>alert(1)</script> & tests",
        expected={"perplexity": {"value": 1.0, "within": 0.5}},
    )  # fmt: skip
    result = compress.run(recipe, home / "run", cache_dir=home / "cache")
    return recipe, result, home


def test_what_a_run_leaves(finished):
    _, result, home = finished
    assert {p.name for p in result.folder.iterdir()} == {
        ".lock", "recipe.yaml", "lock.json", "journal.jsonl", "model",
        "evaluation-before.json", "report.json", "report.md", "report.html", "run.log",
    }  # fmt: skip
    assert {p.name for p in home.iterdir()} <= {"run", "cache"}
    assert (result.model / "tokenizer.json").exists()
    assert result.seconds > 0 and result.peak_bytes > 10**7


def test_report(finished):
    recipe, result, _ = finished
    report = Report.model_validate_json((result.folder / "report.json").read_text())
    assert report == result.report
    assert [s.method for s in report.steps] == ["ffn_width", "gptq"]
    assert report.before.perplexity.perplexity > 1 and report.after.perplexity.perplexity > 1
    assert report.run.seed == 5 and report.run.model_sha256
    assert {d.role for d in report.data} == {"calibration", "evaluation"}
    assert report.after.cost.macs != report.before.cost.macs
    assert report.after.cost.size != report.before.cost.size
    missed = [f.level for f in report.findings if "NOT reproduced" in f.text]
    assert missed == ["warning"]
    page = (result.folder / "report.html").read_text()
    assert "<script>alert(1)" not in page


def test_lock(finished, text):
    _, result, _ = finished
    lock = json.loads((result.folder / "lock.json").read_text())
    assert set(lock["must"]) == {
        "model", "config.json", "files beside the weights", "calibration tokens",
        "evaluation tokens",
    }  # fmt: skip
    assert all(len(digest) == 64 for digest in lock["must"].values())
    assert lock["seed"] == 5 and lock["may"]["torch"].startswith(torch.__version__.split("+")[0])
    assert {"python", "transformers", "threads", "compress"} <= set(lock["may"])


def test_resolved_recipe_gives_the_same_model(finished, helpers, tmp_path):
    _, result, _ = finished
    again = compress.run(result.folder / "recipe.yaml", tmp_path / "again")
    assert helpers.contents(again.model) == helpers.contents(result.model)


def test_done_run_answers_at_once_and_touches_nothing(finished, monkeypatch):
    recipe, result, _ = finished
    before = stamps(result.folder)
    monkeypatch.setattr(
        "compress.engine.planned.plan", lambda *_a, **_k: pytest.fail("planned again")
    )
    again = compress.run(recipe, result.folder)
    assert stamps(result.folder) == before
    assert (again.report, again.seconds) == (result.report, result.seconds)


def stamps(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_changed_recipe_in_an_old_folder(finished):
    recipe, result, _ = finished
    before = stamps(result.folder)
    with pytest.raises(CompressError) as caught:
        compress.run({**recipe, "seed": 6}, result.folder)
    assert "-seed: 5" in str(caught.value) and "+seed: 6" in str(caught.value)
    assert stamps(result.folder) == before


def interrupt(recipe, out, monkeypatch) -> None:
    """Start a run and stop it after its first block."""

    def stop(*_args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("compress.system.progress.Progress.update", stop)
        with pytest.raises(KeyboardInterrupt):
            compress.run(recipe, out)


def test_changed_model_on_resume(own_checkpoint, tiny, text, helpers, tmp_path, monkeypatch):
    folder = own_checkpoint("llama")
    recipe = helpers.recipe(folder, ["wanda"], text)
    interrupt(recipe, tmp_path / "run", monkeypatch)
    tiny("llama", seed=1).save_pretrained(folder)
    with pytest.raises(CompressError, match="the same model"):
        compress.run(recipe, tmp_path / "run")


def test_changed_text_on_resume(checkpoint, text, helpers, tmp_path, monkeypatch):
    own = tmp_path / "words.txt"
    own.write_text(text.read_text())
    recipe = helpers.recipe(checkpoint("llama"), ["wanda"], own)
    interrupt(recipe, tmp_path / "run", monkeypatch)
    own.write_text("Another beginning. " + text.read_text())
    with pytest.raises(CompressError, match="the same calibration tokens"):
        compress.run(recipe, tmp_path / "run")
    own.write_text(text.read_text())
    assert compress.run(recipe, tmp_path / "run").model.exists()


def test_a_home_that_nobody_has_is_refused(text, helpers, tmp_path):
    recipe = helpers.recipe("~nobody-has-this-name/model", [{"method": "magnitude"}], text)
    with pytest.raises(compress.CompressError, match="nobody-has-this-name"):
        compress.run(recipe, tmp_path / "run")


def test_writes_only_inside_its_folder(own_checkpoint, text, helpers, tmp_path, monkeypatch):
    source = own_checkpoint("llama")
    for name in ("home", "cwd", "tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "cwd")
    before = helpers.contents(source)
    recipe = helpers.recipe(source, STEPS, text, evaluation=helpers.evaluation(text))
    compress.run(recipe, tmp_path / "run", cache_dir=tmp_path / "cache")
    assert helpers.contents(source) == before
    assert os.listdir(tmp_path / "cwd") == [] and os.listdir(tmp_path / "home") == []


def test_recipe_without_steps_evaluates(checkpoint, text, helpers, tmp_path):
    recipe = helpers.recipe(checkpoint("llama"), [], evaluation=helpers.evaluation(text))
    result = compress.run(recipe, tmp_path / "run")
    assert result.report.before is None and result.report.after.perplexity.tokens > 0
    assert not result.model.exists() and result.seconds == 0


def test_recipe_without_evaluation_has_no_report(checkpoint, helpers, tmp_path):
    result = compress.run(helpers.recipe(checkpoint("llama"), ["magnitude"]), tmp_path / "run")
    assert result.report is None and (result.model / "config.json").exists()
    assert not (result.folder / "report.json").exists()


def test_masked_model_is_evaluated_by_masked_scores(checkpoint, text, helpers, tmp_path):
    section = helpers.evaluation(text, masked={"pll_positions": 16})
    recipe = helpers.recipe(checkpoint("bert"), ["wanda"], text, evaluation=section)
    report = compress.run(recipe, tmp_path / "run").report
    assert report.after.perplexity is None and report.after.masked is not None


def test_storage_dtype_and_shards(checkpoint, helpers, tmp_path):
    output = {"dtype": "bfloat16", "max_shard_size": "40kB"}
    recipe = helpers.recipe(checkpoint("llama"), ["magnitude"], output=output)
    result = compress.run(recipe, tmp_path / "run")
    weights = helpers.weights(result.model)
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    assert len(list(result.model.glob("model-*.safetensors"))) > 1
    assert (result.model / "model.safetensors.index.json").exists()
    model, tokenizer = compress.load(result.model)
    assert model.config.num_hidden_layers == 3 and tokenizer is not None


def test_memory_limit_stops_a_run_between_blocks(checkpoint, text, helpers, tmp_path, monkeypatch):
    recipe = helpers.recipe(checkpoint("llama"), ["wanda"], text)
    monkeypatch.setattr("compress.system.memory.peak", lambda: 10**13)
    with pytest.raises(CompressError, match="max-memory"):
        compress.run(recipe, tmp_path / "run", max_memory=10**12)
    monkeypatch.undo()
    assert compress.run(recipe, tmp_path / "run").model.exists()


def test_refused_recipe_may_be_mended(checkpoint, text, helpers, tmp_path):
    """What was refused before the first block has not taken the folder."""
    source, out = checkpoint("llama"), tmp_path / "run"
    wrong = helpers.recipe(source, [{"method": "rtn", "group_size": 128}], text)
    long = helpers.recipe(source, [{"method": "rtn", "group_size": 16}], text)
    long["calibration"]["samples"] = 10**6
    for recipe in (wrong, long):
        with pytest.raises(CompressError, match="group_size|samples"):
            compress.run(recipe, out)
    mended = helpers.recipe(source, [{"method": "rtn", "group_size": 16}], text)
    assert compress.run(mended, out).model.exists()


def test_a_refused_run_leaves_no_folder(checkpoint, text, helpers, tmp_path):
    (tmp_path / "mine").mkdir()
    wrong = helpers.recipe(checkpoint("llama"), [{"method": "rtn", "group_size": 128}], text)
    for out in (tmp_path / "a" / "b" / "run", tmp_path / "mine"):
        with pytest.raises(CompressError, match="group_size"):
            compress.run(wrong, out)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    assert list((tmp_path / "mine").iterdir()) == []  # it was there before, empty


def test_order_of_keys_means_nothing(checkpoint, text, helpers, tmp_path):
    section = helpers.evaluation(text)
    recipe = helpers.recipe(checkpoint("llama"), [], evaluation=section)
    first = compress.run(recipe, tmp_path / "run")
    turned = {**recipe, "evaluation": dict(reversed(section.items()))}
    assert compress.run(turned, tmp_path / "run").report == first.report
