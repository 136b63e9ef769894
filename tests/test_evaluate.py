"""One way to evaluate: Python, the command line and runs measure, refuse and report the same."""

from __future__ import annotations

import pytest
import torch

import compress
from compress.cli.app import main
from compress.errors import CompressError
from compress.eval import EvaluationSpec
from compress.eval.report import Report, load_report


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


def test_python_and_the_command_give_the_same_report(
    checkpoint, text, command, helpers, tmp_path, memory_unmeasured
):
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
    assert (
        helpers.lasting(report)
        == helpers.lasting(told)
        == helpers.lasting(load_report(tmp_path / "b"))
    )
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
    assert [entry.name for entry in made.entries] == ["llama, 0", "llama, 1"]
    same = compress.compare(reports).data()["entries"]
    assert [row | {"name": ""} for row in made.data()["entries"]] == [
        row | {"name": "", "unbeaten_in": told["unbeaten_in"]}
        for row, told in zip(same, made.data()["entries"], strict=True)
    ]
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
    for name in ("out.json", "out.CSV"):  # the page would be lost below the table
        with pytest.raises(CompressError, match=r"HTML page.*Use out\.html"):
            compress.compare(results, tmp_path / name, overwrite=True)
    (tmp_path / "page.html").write_text("mine")
    with pytest.raises(CompressError, match="not to exist yet"):
        compress.compare(results, tmp_path / "page.html")
    with pytest.raises(CompressError, match="a list"):
        compress.compare(str(tmp_path / "0"))
    with pytest.raises(CompressError, match="result.report"):
        compress.compare([object(), object()])


def test_evaluation_is_added_to_a_complete_run(
    checkpoint, text, command, helpers, tmp_path, monkeypatch, memory_unmeasured
):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows.jsonl").write_text('{"q": "one and one", "a": "two"}\n' * 2)
    task = tmp_path / "sums.yaml"
    task.write_text(
        "task: sums\ndataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\n"
        "test_split: test\noutput_type: loglikelihood\ndoc_to_text: '{{q}}'\n"
        "doc_to_target: ' {{a}}'\nmetric_list: [{metric: perplexity}]\n"
    )
    steps, folder = [{"method": "magnitude", "pattern": "2:4"}], tmp_path / "run"
    recipe = helpers.recipe(checkpoint("llama"), steps, evaluation=helpers.evaluation(text))
    first = compress.run(recipe, folder).report
    status, out, err = command("evaluate", folder, "--tasks", task, "--json")
    assert status == 0, err
    report = load_report(folder)
    assert report == Report.model_validate_json(out) and "added afterwards" in report.run.notes[-1]
    for now, then, model in (
        (report.before, first.before, checkpoint("llama")),
        (report.after, first.after, folder / "model"),
    ):
        assert now.perplexity == then.perplexity and now.cost == then.cost
        alone = compress.evaluate(model, {"tasks": [str(task)], "memory": False})
        assert now.tasks.tasks["sums"].metrics == alone.after.tasks.tasks["sums"].metrics
    assert "sums" in (folder / "report.html").read_text()
    with pytest.raises(CompressError, match="limit of the tasks"):
        compress.evaluate(folder, {"tasks": [str(task)], "limit": 1})
    with pytest.raises(CompressError, match="perplexity, which it has"):
        compress.evaluate(folder, helpers.evaluation(text))
    with pytest.raises(CompressError, match="no `out`"):
        compress.evaluate(folder, {"tasks": [str(task)]}, out=tmp_path / "elsewhere")
    with pytest.raises(CompressError, match="neither tasks nor a text"):
        compress.evaluate(folder)
