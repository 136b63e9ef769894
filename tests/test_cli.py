"""The command line: each command in process, the start-up time and an error in processes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml

import compress
from compress.cli.app import main
from compress.methods.catalog import BUILT_IN, METHODS


@pytest.fixture
def cli(capsys):
    """``cli(*arguments)``: (exit status, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        try:
            main([str(a) for a in arguments])
            status = 0
        except SystemExit as leave:
            status = leave.code or 0
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def recipe_file(checkpoint, text, helpers, tmp_path):
    data = helpers.recipe(
        checkpoint("llama"), [{"method": "wanda", "pattern": "2:4"}], text,
        evaluation=helpers.evaluation(text),
    )  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def test_run_twice_and_compare(cli, recipe_file, tmp_path):
    status, out, err = cli("run", recipe_file, "--out", tmp_path / "a")
    assert status == 0, err
    assert str(tmp_path / "a/report.html") in out and str(tmp_path / "a/model") in out
    assert "evaluating the original" in err
    report = json.loads((tmp_path / "a/report.json").read_text())
    assert report["run"]["command"].startswith("compress ")
    status, out, err = cli("run", recipe_file, "--out", tmp_path / "a")
    assert status == 0 and "nothing to do" in err
    status, _, _ = cli(
        "run", recipe_file, "--out", tmp_path / "b", "--quiet", "--set", "steps.0.pattern=4:8"
    )
    assert status == 0
    assert yaml.safe_load((tmp_path / "b/recipe.yaml").read_text())["steps"][0]["pattern"] == "4:8"
    page = tmp_path / "compare.html"
    status, out, _ = cli("compare", tmp_path / "a", tmp_path / "b/report.json", "--out", page)
    assert status == 0 and page.stat().st_size > 1000 and "page" in out
    status, out, _ = cli(
        "compare", tmp_path / "a", tmp_path / "b", "--out", page, "--overwrite", "--json"
    )
    compared = json.loads(out)["entries"]
    assert [entry["original"] for entry in compared] == [True, False, False]
    assert compared[1]["quality"] == report["after"]["perplexity"]["perplexity"]


def test_a_run_keeps_a_log_and_tells_json(cli, recipe_file, tmp_path):
    status, out, err = cli("run", recipe_file, "--out", tmp_path / "a", "--device", "cpu", "--json",
                           "--verbose", "--set", "evaluation=null")  # fmt: skip
    assert status == 0 and json.loads(out)["folder"] == str(tmp_path / "a")
    blocks = [line for line in err.splitlines() if line.startswith("step 1/1 wanda (solve)")]
    assert len(blocks) == 3 and all(" GB" in line for line in blocks)
    log = (tmp_path / "a" / "run.log").read_text()
    assert all(line in log for line in blocks)
    assert yaml.safe_load((tmp_path / "a/recipe.yaml").read_text())["device"] == "cpu"
    status, _, _ = cli("run", recipe_file, "--out", tmp_path / "b", "--max-memory", "1MB")
    assert status == 2 and not (tmp_path / "b" / "run.log").exists()


def test_plan(cli, recipe_file):
    status, out, _ = cli("plan", recipe_file)
    assert status == 0 and "wanda" in out and "original" in out
    status, out, _ = cli("plan", recipe_file, "--json")
    rows = json.loads(out)["steps"]
    assert [r["step"] for r in rows] == ["original", "wanda"]
    assert rows[1]["nonzero"] < rows[0]["nonzero"] == rows[0]["parameters"]
    status, _, err = cli("plan", recipe_file, "--max-memory", "1MB")
    assert status == 2 and "--max-memory" in err


def test_evaluate(cli, checkpoint, text, tmp_path):
    status, out, err = cli(
        "evaluate", checkpoint("llama"), "--text", text, "--max-tokens", 128, "--window", 64,
        "--out", tmp_path / "report", "--json",
    )  # fmt: skip
    assert status == 0, err
    assert json.loads(out)["after"]["perplexity"]["tokens"] > 0
    assert (tmp_path / "report/report.html").exists()


def test_inspect(cli, checkpoint):
    status, out, _ = cli("inspect", checkpoint("llama"))
    assert status == 0 and "LlamaForCausalLM" in out and "4/2 x 8" in out
    status, out, _ = cli("inspect", checkpoint("llama"), "--json")
    found = json.loads(out)
    assert len(found["blocks"]) == 3 and found["family"] == "table"
    assert set(found["methods"]) == set(METHODS)
    assert found["methods"]["magnitude"] == "yes" and "128" in found["methods"]["gptq"]


def test_inspect_similarity(cli, checkpoint, text):
    arguments = ("inspect", checkpoint("llama"), "--similarity", text, "--length", 24)
    status, out, err = cli(*arguments)
    assert status == 0, err
    status, told, _ = cli(*arguments, "--json")
    rows = json.loads(told)["similarity"]
    assert [len(row) for row in rows] == [1, 2, 3] and all(row[-1] == 1 for row in rows)
    assert f"{rows[2][1]:.4f}" in out and out.count("@@|") == 3


@pytest.mark.parametrize("method", sorted(BUILT_IN))
def test_methods_show_every_option(cli, method):
    status, out, _ = cli("methods", method)
    cls = METHODS.get(method)
    assert status == 0 and cls.source[:20] in out
    for option, field in cls.model_fields.items():
        assert option in out and field.description


def test_lists(cli):
    status, out, _ = cli("methods")
    assert status == 0 and all(name in out for name in METHODS)
    status, out, _ = cli("methods", "--families")
    assert status == 0 and "modernbert" in out
    status, out, _ = cli("recipes")
    assert status == 0 and "quickstart" in out
    status, out, _ = cli("recipes", "--keys")
    assert status == 0 and "`max_shard_size`" in out
    for arguments in (("methods",), ("methods", "gptq"), ("methods", "--families"), ("recipes",),
                      ("recipes", "--keys")):  # fmt: skip
        status, out, _ = cli(*arguments, "--json")
        assert status == 0 and json.loads(out)


def test_version_and_completion(cli, monkeypatch):
    status, out, _ = cli("--version")
    assert status == 0 and out.split() == ["compress-transformers", compress.__version__]
    assert "run" in complete(cli, monkeypatch, "compress ru")
    assert complete(cli, monkeypatch, "compress methods spars") == ["sparsegpt"]
    assert "quickstart" in complete(cli, monkeypatch, "compress run quick")


def complete(cli, monkeypatch, words: str) -> list[str]:
    """What bash would offer behind ``words``."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["compress"])
        patch.setenv("_COMPRESS_COMPLETE", "complete_bash")
        patch.setenv("COMP_WORDS", words)
        patch.setenv("COMP_CWORD", str(len(words.split()) - 1))
        return cli()[1].split()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "nowhere.yaml"], "the name of a shipped recipe"),
        (["run", "quickstrat"], "'quickstart'"),
        (["plan", "quickstart", "--set", "steps.0.bit=4"], "'bits'"),
        (["plan", "quickstart", "--max-memory", "lots"], "512MB"),
        (["methods", "gtpq"], "'gptq'"),
        (["inspect", "./nowhere"], "pypi:"),
        (["compare", "nowhere"], "report.json"),
    ],
    ids=" ".join,
)
def test_mistakes_are_one_paragraph(cli, arguments, words):
    status, out, err = cli(*arguments)
    assert status == 2 and err.startswith("error: ") and words in err
    assert err.count("\n") == 1 and "Traceback" not in err


def test_usage(cli):
    assert cli("--help")[0] == 0
    assert cli("run")[0] == 2
    assert cli("frobnicate")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["--help"], 0), (["run", "--help"], 0), (["methods"], 0), (["recipes"], 0),
     (["run", "nowhere"], 2), (["plan", "nowhere"], 2)],
)  # fmt: skip
def test_what_needs_no_model_imports_nothing_heavy(arguments, status, tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "compress", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == status
    lines = done.stderr.splitlines()
    imported = {x.rpartition("|")[2].strip() for x in lines if x.startswith("import time:")}
    assert "typer" in imported
    assert not imported & {"torch", "transformers", "datasets", "lm_eval"}
    told = [line for line in lines if not line.startswith("import time:")]
    assert len(told) == bool(status) and all(line.startswith("error: ") for line in told)
