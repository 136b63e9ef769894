"""Methods of strangers: of installed packages, of scripts; each can only break itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import compress
from compress.cli.app import main
from compress.errors import CompressError
from compress.methods.catalog import BUILT_IN, METHODS

HALVE = '''
from typing import ClassVar
from compress.methods.base import LinearMethod

class Halve(LinearMethod):
    """Divide all weights by two."""

    name: ClassVar[str] = "halve"
    summary: ClassVar[str] = "divide all weights by two"
    source: ClassVar[str] = "nobody"
    writes: ClassVar[frozenset[str]] = frozenset({"values"})
    needs: ClassVar[str] = "nothing"

    def predict(self, outline):
        return outline

    def solve(self, work):
        for name in work.names:
            work.weight(name).mul_(0.5)
'''


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """A folder of installed packages."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    known = set(sys.modules)
    yield folder
    for name in set(sys.modules) - known:
        if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def install(site: Path, package: str, source: str, entries: dict[str, str]) -> None:
    """Do what pip does with a package of one module: write it and what it declares."""
    module = package.replace("-", "_")
    (site / f"{module}.py").write_text(textwrap.dedent(source))
    info = site / f"{module}-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.5\n")
    lines = [f"{name} = {module}:{cls}" for name, cls in entries.items()]
    (info / "entry_points.txt").write_text("\n".join(["[compress.methods]", *lines, ""]))


def test_summaries_and_names_of_the_catalogue_are_those_of_the_classes():
    for name in BUILT_IN:
        assert METHODS.get(name).name == name
        assert METHODS.summary(name) == METHODS.get(name).summary
        assert METHODS.origin(name) == "compress"


def test_a_package_is_found_without_being_imported(site, tiny):
    install(site, "compress-halve", HALVE, {"halve": "Halve"})
    assert compress.list_methods()["halve"] == "divide all weights by two"
    assert METHODS.origin("halve") == "the package compress-halve 1.5"
    assert "compress_halve" not in sys.modules
    model = tiny("llama")
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    compress.apply(model, ["halve"])
    assert (model.model.layers[0].mlp.up_proj.weight == before / 2).all()


def test_the_command_line_shows_it(site, capsys):
    install(site, "compress-halve", HALVE, {"halve": "Halve"})
    told = {}
    for words in (("methods",), ("methods", "halve")):
        with pytest.raises(SystemExit) as left:
            main(list(words))
        assert not left.value.code
        told[words] = capsys.readouterr().out
    listed = told["methods",]
    assert "the package compress-halve 1.5" in listed and "divide all weights by two" in listed
    assert "include" in told["methods", "halve"]


def test_listing_in_a_process_imports_neither_package_nor_torch(site):
    install(site, "compress-halve", HALVE, {"halve": "Halve"})
    code = (
        "import sys, json, compress.methods.catalog as c; "
        "found = {n: c.METHODS.summary(n) for n in c.METHODS}; "
        "print(json.dumps([found['halve'], 'torch' in sys.modules, 'compress_halve' in sys.modules,"
        " 'compress.methods.sparsity' in sys.modules]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True
    )
    assert json.loads(done.stdout) == ["divide all weights by two", False, False, False]


@pytest.mark.parametrize(
    ("source", "cls", "words"),
    [
        ("import absent_library", "Broken", "ModuleNotFoundError: No module named"),
        ("raise SystemExit(3)", "Broken", "SystemExit"),
        ("", "Broken", "AttributeError"),
        ("Broken = 3", "Broken", "derived from"),
        (HALVE.replace('"nobody"', '""'), "Halve", "`source`"),
        (HALVE.replace('frozenset({"values"})', 'frozenset({"colour"})'), "Halve", "`writes`"),
        (HALVE.replace('"nothing"', '"luck"'), "Halve", "`needs`"),
        (HALVE.replace('= "halve"', '= "half a model"'), "Halve", "letters"),
        (HALVE, "Halve", "'halve'"),
    ],
    ids=["library", "exit", "gone", "class", "source", "writes", "needs", "name", "other-name"],
)
def test_a_broken_package_breaks_itself_only(site, source, cls, words, checkpoint):
    install(site, "compress-broken", source, {"broken": cls})
    assert "broken" in compress.list_methods()
    with pytest.raises(CompressError, match="compress-broken 1.5") as caught:
        METHODS.get("broken")
    assert words in str(caught.value)
    assert METHODS.get("magnitude").name == "magnitude"
    found = compress.inspect(checkpoint("llama"))["methods"]
    assert found["magnitude"] == "yes" and "compress-broken" in found["broken"]


def test_names_that_clash(site, checkpoint):
    install(site, "compress-one", HALVE, {"halve": "Halve", "wanda": "Halve"})
    install(site, "compress-two", HALVE, {"halve": "Halve"})
    with pytest.raises(CompressError) as caught:
        METHODS.get("halve")
    assert "compress-one" in str(caught.value) and "compress-two" in str(caught.value)
    with pytest.raises(CompressError, match="that of compress and one of the package compress-one"):
        METHODS.get("wanda")
    assert "clash" not in compress.inspect(checkpoint("llama"))["methods"]["gptq"]


def declared(name: str, source: str = HALVE) -> type:
    """The class that a script defines under that name."""
    names = {"__name__": "script"}
    exec(source.replace('= "halve"', f'= "{name}"'), names)
    return names["Other" if "class Other" in source else "Halve"]


def test_a_class_registers_itself(tiny):
    cls = compress.register_method(declared("halve_here"))
    assert METHODS.get("halve_here") is cls
    assert METHODS.origin("halve_here") == "the module script"
    assert compress.list_methods()["halve_here"] == cls.summary
    again = compress.register_method(declared("halve_here"))  # the cell of a notebook runs again
    assert METHODS.get("halve_here") is again is not cls
    compress.apply(tiny("llama"), ["halve_here"])


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("halve_once", ("class Halve", "class Other"), "that of the module script"),
        ("wanda", ("", ""), "that of compress"),
        ("halve_once", ('"divide all weights by two"', "None"), "`summary`"),
    ],
    ids=["other-class", "built-in", "summary"],
)
def test_what_cannot_be_registered(name, change, words):
    compress.register_method(declared("halve_once"))
    with pytest.raises(CompressError, match=words):
        compress.register_method(declared(name, HALVE.replace(*change)))


def test_a_class_of_a_package_may_register_itself_too(site):
    source = HALVE.replace("class Halve", "import compress\n@compress.register_method\nclass Halve")
    install(
        site,
        "compress-both",
        source.replace('= "halve"', '= "halve_both"'),
        {"halve_both": "Halve"},
    )
    assert METHODS.get("halve_both").__module__ == "compress_both"


def test_a_package_and_a_script_that_clash(site):
    source = HALVE.replace('= "halve"', '= "halve_twice"')
    install(site, "compress-first", source, {"halve_twice": "Halve"})
    compress.register_method(declared("halve_twice"))
    with pytest.raises(CompressError, match="compress-first 1.5 and one of the module script"):
        METHODS.get("halve_twice")


def test_the_lock_notes_the_package_of_a_method(site, checkpoint, helpers, tmp_path):
    install(site, "compress-halve", HALVE, {"halve": "Halve"})
    compress.run(helpers.recipe(checkpoint("llama"), ["halve"]), tmp_path / "run")
    assert json.loads((tmp_path / "run/lock.json").read_text())["may"]["compress-halve"] == "1.5"
