"""Figures that are not measured twice, and everything that makes them be measured again."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

import compress
from compress.eval.report import Report
from compress.system.imports import run_imports


@pytest.fixture
def entries(tmp_path_factory, monkeypatch):
    """The files of figures in an empty cache."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return lambda: sorted((cache / "compress" / "evaluations").glob("*"))


def test_the_second_time_figures_come_from_the_cache(own_checkpoint, section, entries, tmp_path):
    source = own_checkpoint("llama")
    first = compress.evaluate(source, section)
    assert first.after.cached == {} and len(entries()) == 1
    assert entries()[0].stat().st_size < 10_000
    second = compress.evaluate(source, section, out=tmp_path / "report")
    assert second.after.perplexity == first.after.perplexity
    measured = second.after.cached["perplexity"]
    assert [f.text for f in second.findings if measured in f.text and "cache" in f.text]
    assert measured in (tmp_path / "report" / "report.md").read_text()
    assert second.after.seconds["perplexity"] == first.after.seconds["perplexity"]
    # What decides no figure: the folder's name, who wrote the config, verdicts, the same in words.
    moved = source.rename(tmp_path / "elsewhere")
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "transformers_version": "0"}))
    (moved / "README.md").write_text("a model")
    others = {"tolerance": {"perplexity": 0.5}, "stride": 64, "latency": False, "context": 8}
    assert compress.evaluate(moved, {**section, **others}).after.cached
    assert len(entries()) == 1


CHANGES = {
    "weights": lambda section, **_: section,
    "config": lambda section, **_: section,
    "tokenizer": lambda section, **_: section,
    "text": lambda section, tmp_path, **_: {**section, "text": {"source": str(tmp_path / "t.txt")}},
    "window": lambda section, **_: {**section, "window": 32},
    "tokens": lambda section, **_: {**section, "max_tokens": 192},
    "batch": lambda section, **_: {**section, "batch_size": 2},
    "code": lambda section, **_: section,
    "versions": lambda section, **_: section,
    "off": lambda section, **_: {**section, "cache": False},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_decides_a_figure_measures_it_again(
    own_checkpoint, tiny, section, text, entries, change, tmp_path, monkeypatch
):
    source = own_checkpoint("llama")
    compress.evaluate(source, section)
    (tmp_path / "t.txt").write_text("Another beginning. " + text.read_text())
    if change == "weights":
        tiny("llama", seed=1).save_pretrained(source)
    elif change == "config":
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    elif change == "tokenizer":
        (source / "special_tokens_map.json").write_text("{}")
    elif change == "code":
        monkeypatch.setattr("compress.eval.cache.code_digest", lambda: "other")
    elif change == "versions":
        monkeypatch.setattr("compress.eval.cache.versions", lambda: {"torch": "0"})
    asked = CHANGES[change](section, tmp_path=tmp_path)
    assert compress.evaluate(source, asked).after.cached == {}
    assert len(entries()) == (1 if change == "off" else 2)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def _flip(path: Path) -> None:
    entry = json.loads(path.read_text())
    entry["result"]["perplexity"] *= 1.01
    path.write_text(json.dumps(entry))


def _endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("damage", [_cut, _flip, _endless])
def test_a_damaged_entry_is_measured_again_and_replaced(checkpoint, section, entries, damage):
    first = compress.evaluate(checkpoint("llama"), section)
    damage(entries()[0])
    second = compress.evaluate(checkpoint("llama"), section)
    assert second.after.cached == {} and second.after.perplexity == first.after.perplexity
    assert len(entries()) == 1 and compress.evaluate(checkpoint("llama"), section).after.cached


def test_a_cache_that_cannot_be_written_costs_a_warning(checkpoint, section, tmp_path):
    (tmp_path / "evaluations").write_text("a file")
    with pytest.warns(UserWarning, match="not cached"):
        report = compress.evaluate(checkpoint("llama"), section, cache_dir=tmp_path)
    assert report.after.perplexity is not None


def test_the_entries_that_were_used_last_stay(checkpoint, section, entries, monkeypatch):
    monkeypatch.setattr("compress.eval.cache.MOST_ENTRIES", 2)
    windows = [{**section, "window": n} for n in (16, 32, 64)]
    for asked in (windows[0], windows[1], windows[0], windows[2]):
        compress.evaluate(checkpoint("llama"), asked)
    assert len(entries()) == 2
    found = [bool(compress.evaluate(checkpoint("llama"), w).after.cached) for w in windows[::2]]
    assert found == [True, True]


def test_live_models_are_always_measured(tiny, tokenizer, section, entries):
    for _ in range(2):
        report = compress.evaluate(tiny("llama"), section, tokenizer=tokenizer)
        assert report.after.cached == {} and not entries()


def test_models_with_code_of_their_own_are_always_measured(checkpoint, section, entries):
    for _ in range(2):
        report = compress.evaluate(checkpoint("llama"), section, trust_remote_code=True)
        assert report.after.cached == {} and not entries()


ARCHITECTURE = """
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own-llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = found.logits * SCALE
        return found


AutoConfig.register("own-llama", OwnConfig, exist_ok=True)
AutoModelForCausalLM.register(OwnConfig, OwnForCausalLM, exist_ok=True)
"""


@pytest.fixture
def own_architecture(own_checkpoint):
    """A checkpoint whose class transformers does not have."""
    source = own_checkpoint("llama")
    config = json.loads((source / "config.json").read_text())
    own = {"model_type": "own-llama", "architectures": ["OwnForCausalLM"]}
    (source / "config.json").write_text(json.dumps({**config, **own}))
    return source


def test_code_that_a_recipe_imports_decides_figures(
    own_architecture, section, entries, tmp_path, monkeypatch
):
    monkeypatch.setattr("compress.system.imports._digests", {})
    file = tmp_path / "arch.py"

    def measured(scale: float):
        file.write_text(f"SCALE = {scale}\n{ARCHITECTURE}")
        run_imports((str(file),), tmp_path, "a recipe")
        return compress.evaluate(own_architecture, section).after

    first = measured(1.0)
    assert first.cached == {} and measured(1.0).cached.keys() == {"perplexity"}
    changed = measured(0.5)
    assert changed.cached == {}
    assert changed.perplexity.perplexity != first.perplexity.perplexity


def test_a_class_whose_code_no_digest_tells_is_measured(own_architecture, section, entries):
    exec(f"SCALE = 1.0\n{ARCHITECTURE}", {"__name__": "elsewhere"})
    for _ in range(2):
        assert compress.evaluate(own_architecture, section).after.cached == {} and not entries()


def test_masked_models_and_generators(checkpoint, section, entries):
    source = checkpoint("bert")
    section = {**section, "window": 32, "max_tokens": 128, "masked": {"pll_positions": 8}}
    scores = [compress.evaluate(source, section).after for _ in range(2)]
    assert scores[0].masked == scores[1].masked and list(scores[1].cached) == ["masked"]
    generator = {"samples": 2, "steps": [2], "draws": 2, "ordered_sequences": 1}
    section = {**section, "objective": "masked", "generator": generator}
    first, second = (compress.evaluate(source, section).after for _ in range(2))
    assert second.cached.keys() == {"generator"}
    for name in ("likelihood", "ordered", "recovery"):
        assert getattr(first.generator, name) == getattr(second.generator, name)
    # Samples are drawn each time: how long that takes is a figure.
    points = [r.generator.generation.points[0] for r in (first, second)]
    assert points[0].seconds != points[1].seconds and points[0].text == points[1].text
    again = compress.evaluate(source, {**section, "generator": {**generator, "samples": 3}}).after
    assert again.cached and again.generator.generation.samples == 3
    paired = compress.evaluate(source, {**section, "latency": False}, against=source).after
    assert paired.cached == {} and paired.generator.recovery[0].divergence is not None


def test_tasks_with_local_data(checkpoint, section, entries, tmp_path):
    data = tmp_path / "data" / "piqa" / "validation.jsonl"
    data.parent.mkdir(parents=True)
    question = {"goal": "open", "sol1": "twist it", "sol2": "eat it", "label": 0}
    data.write_text(json.dumps(question) + "\n")
    section = {**section, "tasks": ["piqa"]}

    def cached() -> set[str]:
        report = compress.evaluate(checkpoint("llama"), section, data_root=tmp_path / "data")
        return set(report.after.cached)

    assert [cached(), cached()] == [set(), {"perplexity", "tasks"}]
    data.write_text(json.dumps({**question, "label": 1}) + "\n")
    assert cached() == {"perplexity"}


def test_a_second_run_on_the_same_original(checkpoint, text, helpers, entries, tmp_path):
    def run(name: str, step: dict[str, Any], **evaluation: Any) -> Report:
        section = helpers.evaluation(text, **evaluation)
        recipe = helpers.recipe(checkpoint("llama"), [step], text, evaluation=section)
        return compress.run(recipe, tmp_path / name).report

    first = run("a", {"method": "wanda", "pattern": "2:4"})
    assert first.before.cached == {} and len(entries()) == 1
    second = run("b", {"method": "magnitude", "pattern": "2:4"})
    assert second.before.cached.keys() == {"perplexity"} and second.after.cached == {}
    assert second.before.perplexity == first.before.perplexity and len(entries()) == 1
    assert [f for f in second.findings if "perplexity of the original, measured at" in f.text]
    assert run("c", {"method": "rtn", "group_size": 16}, cache=False).before.cached == {}


def test_a_run_that_resumes_with_a_cached_evaluation(
    checkpoint, text, helpers, tmp_path, monkeypatch
):
    recipe = helpers.recipe(
        checkpoint("llama"), ["wanda"], text, evaluation=helpers.evaluation(text)
    )
    compress.run(recipe, tmp_path / "first")
    whole = compress.run(recipe, tmp_path / "whole").report
    with monkeypatch.context() as patch:
        patch.setattr("compress.engine.job.Job.write", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            compress.run(recipe, tmp_path / "stopped")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing has to be measured, so nothing is kept
        resumed = compress.run(recipe, tmp_path / "stopped").report
    assert resumed.before.cached and resumed.before.cached == whole.before.cached
    told = [helpers.lasting(report) for report in (whole, resumed)]
    for data in told:
        for step in data["steps"]:
            del step["seconds"], step["peak_rss_bytes"]
    assert told[0] == told[1]
