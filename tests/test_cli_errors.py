"""What the command line says when something goes wrong, and with which status it ends."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys

import pytest
from safetensors import SafetensorError

import compress.planning.recipe_files
from compress.cli import errors
from compress.cli.app import main
from compress.errors import CompressError
from compress.system.progress import Progress


def test_a_defect_is_called_one(monkeypatch, capsys):
    def broken(*_):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(compress.planning.recipe_files, "find_recipe", broken)
    with pytest.raises(SystemExit) as leave:
        main(["plan", "x"])
    told = capsys.readouterr().err
    assert leave.value.code == errors.DEFECT
    assert told.count("\n") == 1 and "defect" in told and "--traceback" in told
    assert "ZeroDivisionError at recipe_files.py" in told
    with pytest.raises(ZeroDivisionError):
        main(["--traceback", "plan", "x"])


def test_what_the_machine_refuses_is_no_defect(capsys):
    error = PermissionError(errno.EACCES, "Permission denied", "/some/where")
    assert errors.report(error) == errors.USER
    told = capsys.readouterr().err
    assert "/some/where" in told and "Permission denied" in told and "defect" not in told


def test_a_full_disk_is_no_defect_whoever_finds_it(capsys):
    error = SafetensorError("Error while serializing: I/O error: No space left (os error 28)")
    assert errors.report(error) == errors.USER
    assert "room on its disk" in capsys.readouterr().err
    assert errors.report(SafetensorError("Error while serializing: a tensor")) == errors.DEFECT


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

    code = errno.ENOSPC

    def write(self, _text):
        raise OSError(self.code, os.strerror(self.code))


class Late(Full):
    """A stream that learns so when it hands on what it has gathered."""

    def write(self, text):
        return len(text)

    def flush(self):
        super().write("")


class Left(Full):
    """A pipe whose reader has left."""

    code = errno.EPIPE


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


@pytest.mark.parametrize("stream", [Full, Late, Left])
def test_a_run_is_complete_where_its_last_words_are_lost(
    stream, checkpoint, helpers, tmp_path, monkeypatch, capsys
):
    (tmp_path / "recipe.yaml").write_text(
        json.dumps(helpers.recipe(checkpoint("llama"), ["magnitude"]))
    )
    monkeypatch.setattr(sys, "stdout", stream())
    with pytest.raises(SystemExit) as leave:
        main(["run", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run"), "--quiet"])
    told = capsys.readouterr().err
    assert (tmp_path / "run/model/config.json").exists()
    if stream is Left:  # as `| head` does: no failure
        assert leave.value.code == 141 and not told
    else:
        assert leave.value.code == 1 and told.count("\n") == 1
        assert f"the run in {tmp_path / 'run'} is complete" in told and "No space left" in told


def test_a_mistake_is_told_although_output_is_lost(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Late())
    with pytest.raises(SystemExit) as leave:
        main(["run", "nowhere.yaml"])
    assert leave.value.code == errors.USER and "nowhere.yaml" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device without room")
def test_output_that_is_lost_in_a_process():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "compress", "methods", "--families"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: standard output") and done.stderr.count("\n") == 1


def test_work_goes_on_where_the_terminal_is_gone(monkeypatch):
    class Gone(Full):
        code = errno.EIO

        def isatty(self):
            return self.open

    Gone.open = True
    terminal = Gone()
    terminal.write = lambda text: len(text)
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress() as progress:
        del terminal.write
        progress.say("about to begin")
        progress.update("blocks", 1, 2)
    assert progress.quiet
