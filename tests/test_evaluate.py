"""One way to evaluate: Python, the command line and runs measure, refuse and report the same."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress.cli.app import main
from compress.errors import CompressError
from compress.eval import EvaluationSpec
from compress.eval.report import Report, load_report


@pytest.fixture
def section(text) -> dict[str, Any]:
    return {"text": {"source": str(text)}, "max_tokens": 256, "window": 64, "memory": False}


@pytest.fixture
def command(capsys):
    """``command(*arguments)``: (exit status, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        status = 0
        try:
            main([str(a) for a in arguments])
        except SystemExit as leave:
            status = leave.code or 0
        return status, *capsys.readouterr()

    return call


def lasting(report: Report) -> dict[str, Any]:
    """A report without what is of the moment: clocks, memory, the command line."""
    data = report.model_dump(mode="json")
    for name in ("command", "started", "seconds"):
        data["run"].pop(name)
    for result in filter(None, (data["before"], data["after"])):
        result.pop("seconds")
        result["cost"].pop("memory")
    return data


def test_python_and_the_command_give_the_same_report(
    checkpoint, text, command, tmp_path, monkeypatch
):
    # The command always measures memory, in a process that takes seconds to start.
    monkeypatch.setattr("compress.eval.cost.peak_memory", lambda *_args, **_more: None)
    source = checkpoint("llama")
    status, out, err = command(
        "evaluate", source, "--text", text, "--split", "test", "--window", 64, "--max-tokens", 256,
        "--no-cache", "--out", tmp_path / "a", "--json",
    )  # fmt: skip
    assert status == 0, err
    told = Report.model_validate_json(out)
    asked = {
        "text": {"source": str(text), "split": "test", "subset": None}, "window": 64,
        "max_tokens": 256, "packing": "stream", "special_tokens": True, "tasks": [], "limit": None,
        "cache": False,
    }  # fmt: skip
    report = compress.evaluate(source, asked, out=tmp_path / "b")
    assert lasting(report) == lasting(told) == lasting(load_report(tmp_path / "b"))
    assert report.after.perplexity.tokens == 252 and report.run.model_sha256
    assert told.run.command.startswith("compress ") and report.run.seconds > 0
    names = {"report.json", "report.md", "report.html"}
    assert {p.name for p in (tmp_path / "b").iterdir()} == names


def test_a_run_measures_as_evaluate_does(checkpoint, section, helpers, tmp_path):
    source = checkpoint("llama")
    section = {**section, "cache": False, "latency": False}
    ran = compress.run(
        helpers.recipe(source, ["magnitude"], evaluation=section), tmp_path / "run"
    ).report  # fmt: skip
    alone = [compress.evaluate(p, section) for p in (source, tmp_path / "run" / "model")]
    for result, report in zip((ran.before, ran.after), alone, strict=True):
        drop = {"seconds": True}
        assert result.model_dump(exclude=drop) == report.after.model_dump(exclude=drop)
    assert ran.data == alone[0].data


def test_forms_of_an_evaluation(checkpoint, section, text):
    source = checkpoint("llama")
    plain = compress.evaluate(source, section)
    spec = EvaluationSpec(max_tokens=256, window=64, memory=False)
    given = compress.evaluate(source, spec, text={"source": str(text)})
    again = compress.evaluate(source, plain.after.spec)  # which says where its text came from
    figures = {r.after.perplexity.perplexity for r in (plain, given, again)}
    assert len(figures) == 1 and plain.data == given.data == again.data
    bare = compress.evaluate(source, {"memory": False})
    assert bare.after.perplexity is None and bare.after.cost.size.parameters > 0
    with pytest.raises(CompressError, match="one evaluation text"):
        compress.evaluate(source, section, text={"source": str(text)})
    with pytest.raises(CompressError, match="a dict"):
        compress.evaluate(source, ["text"])


@pytest.mark.parametrize(
    ("options", "fields", "words"),
    [
        (["--text", "gone.txt"], {"text": {"source": "gone.txt", "split": "test"}}, "gone.txt"),
        (["--text", "{text}", "--window", "129"], {"window": 129}, "128, the model's positions"),
        (["--text", "{short}", "--window", "64"],
         {"text": {"source": "{short}", "split": "test"}, "window": 64}, "at least one window"),
        (["--tasks", "hellaswagg"], {"text": None, "tasks": ["hellaswagg"]}, "'hellaswag'"),
        (["--images", "digits"], {"text": None, "images": {"source": "digits"}}, "masked gen"),
        (["--text", "{text}", "--documents"], {"packing": "documents"}, "a causal one"),
        (["--data-root", "nowhere"], {"text": None}, "as data root"),
        (["--out", "{out}"], {"text": None}, "not to exist yet"),
        (["--device", "abacus"], {"text": None}, "a device"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_the_same_mistake_is_the_same_error(
    checkpoint, text, command, options, fields, words, tmp_path
):
    (tmp_path / "short.txt").write_text("few words " * 4)
    (tmp_path / "report.md").write_text("mine")
    names = {"text": str(text), "short": str(tmp_path / "short.txt"), "out": str(tmp_path)}
    source = checkpoint("llama")
    status, _, err = command("evaluate", source, "--quiet", *(o.format(**names) for o in options))
    asked = {"text": {"source": str(text), "split": "test"}, **fields}
    if asked["text"] is None:
        del asked["text"]
    else:
        asked["text"]["source"] = asked["text"]["source"].format(**names)
    others = dict(zip(options[::2], options[1::2], strict=False))
    more = {
        name.strip("-").replace("-", "_"): others[name].format(**names)
        for name in ("--data-root", "--out", "--device") if name in others
    }  # fmt: skip
    with pytest.raises(CompressError) as raised:
        compress.evaluate(source, asked, **more)
    assert status == 2 and err == f"error: {raised.value}\n" and words in err
    assert (tmp_path / "report.md").read_text() == "mine"


def test_a_checkpoint_without_a_tokenizer(tiny, section, tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    assert compress.evaluate(tmp_path, {"memory": False}).after.cost.size.parameters > 0
    with pytest.raises(CompressError, match="a tokenizer beside the weights"):
        compress.evaluate(tmp_path, section)


def test_live_models(checkpoint, tiny, tokenizer, section):
    folder = checkpoint("llama")
    model = tiny("llama").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = compress.evaluate(model, section, tokenizer=tokenizer, against=folder)
    assert report.after.perplexity == compress.evaluate(folder, section).after.perplexity
    assert report.after.latency is not None and report.after.cost.memory is None
    assert report.title == "LlamaForCausalLM" and report.run.model_sha256 is None
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    changed = compress.evaluate(model, section, tokenizer=tokenizer)
    assert changed.after.perplexity != report.after.perplexity and changed.after.cached == {}


def test_what_is_no_live_model(checkpoint, tiny, tokenizer, section):
    with pytest.raises(CompressError, match="a transformers model"):
        compress.evaluate(torch.nn.Linear(2, 2), section)
    with torch.device("meta"):
        empty = type(tiny("llama"))(tiny("llama").config)
    with pytest.raises(CompressError, match="weights in memory"):
        compress.evaluate(empty, section, tokenizer=tokenizer)
    with pytest.raises(CompressError, match="a tokenizer, to read"):
        compress.evaluate(tiny("llama"), section)
    with pytest.raises(CompressError, match="live model only"):
        compress.evaluate(checkpoint("llama"), section, tokenizer=tokenizer)


def test_compare(checkpoint, section, command, tmp_path):
    reports = [
        compress.evaluate(checkpoint("llama", seed=seed), section, out=tmp_path / str(seed))
        for seed in (0, 1)
    ]
    page = tmp_path / "page.html"
    made = compress.compare([tmp_path / "0", tmp_path / "1" / "report.json"], page)
    assert made.markdown() == compress.compare(reports).markdown()
    status, out, _ = command("compare", tmp_path / "0", tmp_path / "1", "--out", tmp_path / "b")
    assert status == 0 and out.startswith(made.markdown())
    assert (tmp_path / "b").read_text() == page.read_text() == made.html()


@pytest.mark.parametrize(
    ("results", "words"), [(["nowhere", "b"], "report.json"), (["{0}"], "at least two")]
)
def test_compare_refuses_alike(checkpoint, section, command, results, words, tmp_path):
    compress.evaluate(checkpoint("llama"), section, out=tmp_path / "0")
    results = [name.format(tmp_path / "0") for name in results]
    status, _, err = command("compare", *results, "--out", tmp_path / "page.html")
    with pytest.raises(CompressError, match=words) as raised:
        compress.compare(results, tmp_path / "page.html")
    assert status == 2 and err == f"error: {raised.value}\n"
    (tmp_path / "page.html").write_text("mine")
    with pytest.raises(CompressError, match="not to exist yet"):
        compress.compare(results, tmp_path / "page.html")
    with pytest.raises(CompressError, match="a list"):
        compress.compare(str(tmp_path / "0"))
    with pytest.raises(CompressError, match="result.report"):
        compress.compare([object(), object()])


# The cache.


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
    told = [lasting(report) for report in (whole, resumed)]
    for data in told:
        for step in data["steps"]:
            del step["seconds"], step["peak_rss_bytes"]
    assert told[0] == told[1]
