"""A run's folder: one process, one recipe, a journal that survives."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from compress.engine.workspace import Workspace
from compress.errors import CompressError
from compress.system.files import write_atomically

RECIPE = "seed: 1\n"


def test_second_holder_is_refused(tmp_path):
    with Workspace(tmp_path / "run"), pytest.raises(CompressError, match="another run"):
        Workspace(tmp_path / "run").__enter__()
    with Workspace(tmp_path / "run"):
        pass  # free again


HOLDER = """
import sys
from pathlib import Path
from compress.engine.workspace import Workspace
with Workspace(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_second_process_is_refused_and_a_dead_one_holds_nothing(tmp_path):
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    with pytest.raises(CompressError, match="another run"):
        Workspace(folder).__enter__()
    process.kill()
    process.communicate()
    with Workspace(folder):
        pass


def test_journal_is_read_back(tmp_path):
    with Workspace(tmp_path) as first:
        first.claim(RECIPE)
        first.append({"event": "a", "n": 1})
        first.append({"event": "a", "n": 2})
        assert not first.resumed or first.events
    with Workspace(tmp_path) as second:
        assert second.resumed
        assert [e["n"] for e in second.find(event="a")] == [1, 2]
        assert second.find(event="a", n=2) == [{"event": "a", "n": 2}]
        assert second.find(event="b") == []


@pytest.mark.parametrize("torn", ['{"event": "b"', "{", '{"event": "b"}', "\x00\x00"])
def test_torn_last_line_never_happened(tmp_path, torn):
    with Workspace(tmp_path) as workspace:
        workspace.claim(RECIPE)
        workspace.append({"event": "a"})
    with open(workspace.journal, "a") as file:
        file.write(torn)  # without the newline that ends a whole one
    with Workspace(tmp_path) as workspace:
        assert workspace.events == [{"event": "a"}]
        workspace.append({"event": "c"})
    lines = workspace.journal.read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["a", "c"]


def test_torn_first_line(tmp_path):
    with Workspace(tmp_path) as workspace:
        workspace.claim(RECIPE)
        workspace.journal.write_text('{"event"')
    with Workspace(tmp_path) as workspace:
        assert workspace.events == [] and workspace.journal.read_text() == ""


@pytest.mark.parametrize(
    ("damage", "left"),
    [
        (lambda lines: [*lines[:1], *lines[2:]], 1),  # lost
        (lambda lines: [*lines[:2], *lines[1:]], 2),  # doubled
        (lambda lines: [lines[0], lines[2], lines[1], lines[3]], 1),  # moved
        (lambda lines: [lines[0], lines[1].replace(b'"n": 1', b'"n": 7'), *lines[2:]], 1),
        (lambda lines: [*lines[:3], bytes(len(lines[3])) + b"\n"], 3),
        (lambda lines: [*lines[:2], b"[1]\n", *lines[2:]], 2),
    ],
)
def test_journal_counts_up_to_the_first_damaged_line(damage, left, tmp_path):
    with Workspace(tmp_path) as workspace:
        workspace.claim(RECIPE)
        for n in range(4):
            workspace.append({"event": "a", "n": n})
    lines = workspace.journal.read_bytes().splitlines(keepends=True)
    workspace.journal.write_bytes(b"".join(damage(lines)))
    for _ in range(2):
        with Workspace(tmp_path) as workspace:
            assert [e["n"] for e in workspace.events] == list(range(left))
            assert f"line {left + 1}" in workspace.notes[0]


def test_rewound_events_do_not_count(tmp_path):
    with Workspace(tmp_path) as workspace:
        workspace.claim(RECIPE)
        for n in range(3):
            workspace.append({"event": "a", "n": n})
        workspace.rewind(workspace.events[1], "the file is gone")
        workspace.append({"event": "b"})
    with Workspace(tmp_path) as workspace:
        assert workspace.events == [{"event": "a", "n": 0}, {"event": "b"}]
        assert workspace.notes == ["the file is gone"]


def test_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CompressError, match="other files.*--out"):
        Workspace(tmp_path).__enter__()
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(CompressError, match="a folder"):
        Workspace(tmp_path / "run").__enter__()
    with pytest.raises(CompressError, match="can be written"):
        Workspace(tmp_path / "run" / "below").__enter__()


def test_another_recipe_is_refused_with_the_difference(tmp_path):
    with Workspace(tmp_path) as workspace:
        workspace.claim("seed: 1\nname: a\n")
        workspace.claim("seed: 1\nname: a\n")
        workspace.append({"event": "block", "step": 0})
        with pytest.raises(CompressError) as caught:
            workspace.claim("seed: 2\nname: a\n")
    assert "-seed: 1" in str(caught.value) and "+seed: 2" in str(caught.value)
    assert "name: a" not in str(caught.value)
    assert (tmp_path / "recipe.yaml").read_text() == "seed: 1\nname: a\n"


def test_pinned_facts(tmp_path):
    facts = {"must": {"model": "abc"}, "may": {"torch": "1"}, "seed": 0}
    with Workspace(tmp_path) as workspace:
        workspace.claim(RECIPE)
        assert workspace.pin(facts) == {}
        assert workspace.pin(facts) == {}
        newer = {**facts, "may": {"torch": "2", "extra": None}}
        assert workspace.pin(newer) == {"torch": ["1", "2"]}
        with pytest.raises(CompressError, match="the same model.*'xyz' instead of 'abc'"):
            workspace.pin({**facts, "must": {"model": "xyz"}})
    assert json.loads((tmp_path / "lock.json").read_text()) == facts


def test_kept_values_are_chosen_once(tmp_path):
    facts = {"must": {"model": "abc"}, "may": {}, "seed": 0}
    with Workspace(tmp_path) as workspace:
        assert workspace.keep("compute", lambda: "bfloat16") == "bfloat16"
        assert not (tmp_path / "lock.json").exists()  # the recipe may yet be refused
        workspace.claim(RECIPE)
        assert workspace.keep("precision", lambda: "float32") == "float32"
        workspace.pin(facts)
    with Workspace(tmp_path) as workspace:
        assert workspace.keep("compute", lambda: "float32") == "bfloat16"
        assert workspace.keep("precision", lambda: "bfloat16") == "float32"
        assert workspace.pin(facts) == {}
    kept = {"compute": "bfloat16", "precision": "float32"}
    assert json.loads((tmp_path / "lock.json").read_text()) == {**facts, "kept": kept}
    follower = Workspace(tmp_path)
    assert follower.keep("compute", lambda: "float32") == "bfloat16"
    assert follower.keep("other", lambda: 1) == 1
    assert "other" not in (tmp_path / "lock.json").read_text()


def test_write_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    write_atomically(path, "old")

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("compress.system.files.os.fsync", full)
    with pytest.raises(CompressError, match="No space left.*GB free"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file.txt"]
