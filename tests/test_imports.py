"""``imports`` of recipes: code that runs before the steps are read, recorded and pinned."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest
import yaml

import compress
from compress.errors import CompressError
from compress.planning.recipe import parse_recipe, read_recipe

SCRIPT = '''
from typing import ClassVar
import compress
from compress.methods.base import LinearMethod

@compress.register_method
class Scale(LinearMethod):
    """Multiply all weights."""

    name: ClassVar[str] = "scale"
    summary: ClassVar[str] = "multiply all weights"
    source: ClassVar[str] = "nobody"
    writes: ClassVar[frozenset[str]] = frozenset({"values"})
    needs: ClassVar[str] = "nothing"

    def predict(self, outline):
        return outline

    def solve(self, work):
        for name in work.names:
            work.weight(name).mul_(FACTOR)
'''


@pytest.fixture
def write(tmp_path, checkpoint, helpers):
    """``write(name, source, **more)``: a recipe beside a script; returns the recipe's path."""

    def make(name: str, factor: float = 0.5, **more) -> Path:
        folder = tmp_path / "recipes"
        folder.mkdir(exist_ok=True)
        source = SCRIPT.replace("FACTOR", str(factor)).replace('"scale"', f'"{name}"')
        (folder / "scale.py").write_text(source)
        recipe = helpers.recipe(checkpoint("llama"), [name], imports=["./scale.py"], **more)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return folder / "recipe.yaml"

    return make


def test_a_script_beside_the_recipe(write, tiny, text, helpers, tmp_path):
    path = write("scale_here", evaluation=helpers.evaluation(text))
    script = path.with_name("scale.py")
    result = compress.run(path, tmp_path / "run")
    weight = "model.layers.1.mlp.up_proj.weight"
    found, before = helpers.weights(result.model)[weight], tiny("llama").state_dict()[weight]
    assert (found == before / 2).all()
    digest = hashlib.sha256(script.read_bytes()).hexdigest()
    assert result.report.run.imports == {str(script): digest}
    assert any(str(script) in f.text for f in result.report.findings)
    lock = json.loads((tmp_path / "run/lock.json").read_text())
    assert lock["must"][f"{script} (imported)"] == digest
    page = (tmp_path / "run/report.html").read_text()
    assert digest in page
    # What the run has kept can be run from anywhere.
    assert read_recipe(tmp_path / "run/recipe.yaml").imports == (str(script),)
    again = compress.run(path, tmp_path / "run")
    assert again.model == result.model


def test_a_script_that_changes_while_a_run_is_unfinished(write, tmp_path):
    path = write("scale_changing")
    compress.run(path, tmp_path / "run")
    journal = tmp_path / "run/journal.jsonl"
    journal.write_text("\n".join(journal.read_text().splitlines()[:2]) + "\n")
    write("scale_changing", factor=0.25)
    with pytest.raises(CompressError, match=r"scale\.py \(imported\)"):
        compress.run(path, tmp_path / "run")
    fresh = compress.run(path, tmp_path / "other")
    assert fresh.model.exists()


def test_a_module_by_name(tmp_path, monkeypatch, checkpoint, helpers):
    (tmp_path / "scaling_module.py").write_text(
        SCRIPT.replace('"scale"', '"scale_module"').replace("FACTOR", "2")
    )
    recipe = helpers.recipe(checkpoint("llama"), ["scale_module"], imports=["scaling_module"])
    with pytest.raises(CompressError, match="Install the package"):
        parse_recipe(recipe)
    monkeypatch.syspath_prepend(str(tmp_path))
    parsed = parse_recipe(recipe)
    assert parsed.steps[0].name == "scale_module" and parsed.imports == ("scaling_module",)
    assert parse_recipe(parsed.dump()) == parsed
    del sys.modules["scaling_module"]


@pytest.mark.parametrize(
    ("name", "source", "words"),
    [
        ("absent.py", None, "imports.0"),
        ("wrong.py", "1 / 0", "ZeroDivisionError"),
        ("wrong.py", "def", "SyntaxError"),
        ("wrong.py", "raise SystemExit", "SystemExit"),
        ("wrong.py", "import compress; compress.register_method(int)", "derived from"),
        ("not a module", None, "a module's name"),
        ("no_such_module_anywhere", None, "ModuleNotFoundError"),
    ],
)
def test_imports_that_fail(name, source, words, tmp_path):
    if source is not None:
        (tmp_path / name).write_text(source)
    data = {"model": "some/model", "imports": [name], "steps": ["magnitude"]}
    with pytest.raises(CompressError) as caught:
        parse_recipe(data, "my.yaml", folder=tmp_path)
    assert words in str(caught.value) and "my.yaml, imports.0" in str(caught.value)
    assert not any(m.startswith("wrong_") for m in sys.modules)


def test_nothing_runs_of_a_recipe_that_is_malformed(tmp_path):
    (tmp_path / "mark.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(CompressError, match="'modle'"):
        parse_recipe({"modle": "some/model", "imports": ["mark.py"]}, folder=tmp_path)
    assert not (tmp_path / "ran").exists()


def test_the_code_of_a_recipe_that_lies_in_the_folder_does_not_run(checkpoint, helpers, tmp_path):
    (tmp_path / "mark.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    recipe = helpers.recipe(checkpoint("llama"), ["magnitude"])
    compress.run(recipe, tmp_path / "run")
    theirs = {**recipe, "imports": [str(tmp_path / "mark.py")]}
    (tmp_path / "run/recipe.yaml").write_text(yaml.safe_dump(theirs))
    with pytest.raises(CompressError, match="another one"):
        compress.run(recipe, tmp_path / "run")
    assert not (tmp_path / "ran").exists()


def test_a_script_in_the_output_folder_is_refused(write):
    path = write("scale_inside")
    with pytest.raises(CompressError, match="does not hold what the run is to read"):
        compress.run(path, path.parent)


ARCHITECTURE = """
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "imported-llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

AutoConfig.register("imported-llama", OwnConfig, exist_ok=True)
AutoModelForCausalLM.register(OwnConfig, OwnForCausalLM, exist_ok=True)
"""


def test_a_model_of_an_imported_class_is_proven_with_it(own_checkpoint, helpers, tmp_path):
    source = own_checkpoint("llama")
    config = json.loads((source / "config.json").read_text())
    own = {"model_type": "imported-llama", "architectures": ["OwnForCausalLM"]}
    (source / "config.json").write_text(json.dumps({**config, **own}))
    (tmp_path / "architecture.py").write_text(ARCHITECTURE)
    imports = [str(tmp_path / "architecture.py")]
    result = compress.run(helpers.recipe(source, ["magnitude"], imports=imports), tmp_path / "run")
    journal = (tmp_path / "run/journal.jsonl").read_text().splitlines()
    proof = next(e for e in map(json.loads, journal) if e["event"] == "verified")
    assert proof["process"] == "fresh" and proof["relative_error"] < 1e-4
    assert json.loads((result.model / "config.json").read_text())["model_type"] == "imported-llama"
