"""What the command line says when something goes wrong, and with which status it ends."""

from __future__ import annotations

import errno
import io
import json
import sys

import pytest

import compress.planning.recipe
from compress.cli import errors
from compress.cli.app import main
from compress.errors import CompressError
from compress.system.progress import Progress


def test_a_defect_is_called_one(monkeypatch, capsys):
    def broken(*_):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(compress.planning.recipe, "find_recipe", broken)
    with pytest.raises(SystemExit) as leave:
        main(["plan", "x"])
    told = capsys.readouterr().err
    assert leave.value.code == errors.DEFECT
    assert told.count("\n") == 1 and "defect" in told and "--traceback" in told
    assert "ZeroDivisionError at recipe.py" in told
    with pytest.raises(ZeroDivisionError):
        main(["--traceback", "plan", "x"])


def test_what_the_machine_refuses_is_no_defect(capsys):
    error = PermissionError(errno.EACCES, "Permission denied", "/some/where")
    assert errors.report(error) == errors.USER
    told = capsys.readouterr().err
    assert "/some/where" in told and "Permission denied" in told and "defect" not in told


def test_escape_codes_do_not_reach_the_terminal(capsys):
    errors.report(CompressError("a name", "\x1b]0;owned\x07x"))
    assert capsys.readouterr().err == "error: expected a name, got \\x1b]0;owned\\x07x.\n"


@pytest.mark.parametrize("name", ["../../up", "/abs", "", ".", "a\x1bb"])
def test_a_name_does_not_choose_a_folder_outside_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(json.dumps({"name": name, "model": "x"}))
    with pytest.raises(SystemExit) as leave:
        main(["run", "recipe.yaml"])
    assert leave.value.code == 2 and "--out" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]


class Full(io.StringIO):
    """A stream on a disk without room."""

    def write(self, _text):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_work_goes_on_where_its_progress_cannot_be_written(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Full())
    with Progress(interval=0.0) as progress:
        progress.say("about to begin")
        progress.update("blocks", 1, 2)
    assert progress.quiet
    assert errors.report(CompressError("a recipe", "none")) == errors.USER


def test_without_stderr_nothing_is_told(monkeypatch, capsys):
    closed = io.StringIO()
    closed.close()
    for stream in (closed, None):
        monkeypatch.setattr(sys, "stderr", stream)
        assert Progress().quiet
        assert errors.report(CompressError("a recipe", "none")) == errors.USER
    assert capsys.readouterr().out == ""
