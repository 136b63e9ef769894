"""The code in docs/adding-a-method.md does what the page says, in processes of its own; the keys in
docs/recipes.md are those of the schema."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

PAGE = Path(__file__).parent.parent / "docs" / "adding-a-method.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A folder with the files of the page: the first line of each says its name."""
    folder = tmp_path_factory.mktemp("page")
    for source in blocks("python"):
        name = re.match(r"# (\w+\.py)\n", source)[1]
        assert not (folder / name).exists()
        (folder / name).write_text(source)
    return folder


@pytest.fixture
def python(written, forked_python):
    """``python(*arguments)``: the output of an interpreter that finds the files, which may not
    reach a hub."""

    def call(*arguments: object) -> str:
        done = forked_python(*arguments, cwd=written, env={"PYTHONPATH": str(written)})
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return call


def test_the_scripts_of_the_page(python):
    told = "".join(map(python, ("try_it.py", "light_blocks.py", "family.py")))
    for words in (
        "row_zeros keeps its promises",
        "light_blocks keeps its promises",
        "arcee can be narrowed",
    ):
        assert words in told


def test_every_block_is_run(written):
    assert {p.name for p in written.glob("*.py")} == {
        "compress_row_zeros.py", "try_it.py", "light_blocks.py", "family.py",
    }  # fmt: skip


def test_the_recipe_of_the_page(written, python, checkpoint, text, tmp_path):
    source, _family = blocks("yaml")
    recipe = yaml.safe_load(source)
    recipe |= {"model": str(checkpoint("llama"))}
    recipe["calibration"] |= {"text": {"source": str(text)}, "samples": 2, "length": 16}
    (written / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    python("-m", "compress", "run", written / "recipe.yaml", "--out", tmp_path / "run", "--quiet")
    assert (tmp_path / "run/model/config.json").exists()


def test_the_package_of_the_page(written, python):
    (source,) = blocks("toml")
    project = tomllib.loads(source)["project"]
    info = written / "compress_row_zeros-0.1.0.dist-info"  # what pip makes of it
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = [f"{k} = {v}" for k, v in project["entry-points"]["compress.methods"].items()]
    (info / "entry_points.txt").write_text("\n".join(["[compress.methods]", *lines, ""]))
    listed = python("-m", "compress", "methods")
    assert "the package compress-row-zeros 0.1.0" in listed and "zero a share of each row" in listed
    assert "Share of the weights of a row" in python("-m", "compress", "methods", "row_zeros")


def test_the_keys_of_a_recipe_are_told_and_current():
    from compress.planning import reference

    page = (PAGE.parent / "recipes.md").read_text(encoding="utf-8")
    assert reference.renewed(page) == page, "`make keys` writes the tables anew"
    found = {**reference.sections(), **reference.steps()}
    untold = [f"{place}.{key.name}" for place, keys in found.items()
              for key in keys if not key.meaning]  # fmt: skip
    assert not untold
    named = {key.name: key for key in found["evaluation"]}
    assert named["text"].kind == "section" and named["window"].kind == "whole number"
    assert "training.steps" in {key.name for key in found["distill"]}
    assert found["evaluation.tolerance"][0].default == "0.05"


def test_the_walk_through_runs(checkpoint, text, tmp_path, monkeypatch, capsys, memory_unmeasured):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").symlink_to(checkpoint("llama"))
    (tmp_path / "my-text.txt").symlink_to(text)
    page = (PAGE.parent / "your-own-model.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    exec(compile(code, "your-own-model.md", "exec"), {})
    told = capsys.readouterr().out
    assert "LlamaForCausalLM" in told and "| first |" in told and "| zeros |" in told
    assert (tmp_path / "compare.csv").exists()
