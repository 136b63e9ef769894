"""Killed anywhere, a run that is started again ends with the same bytes.

tests/conformance interrupts a run of every method; here are the places, the losses and the signals.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import yaml

import compress
from compress.conformance.interruption import Killed, killed_at
from compress.engine.sink import JournalSink

TWO_STEPS = (
    {"method": "ffn_width", "share": 0.25, "allocation": "per_layer"},
    {"method": "gptq", "bits": 4, "group_size": 8},
)
LEARNING = {
    "method": "maskllm",
    "training": {"steps": 2, "batch": 2},
    "end_to_end": {"steps": 2, "batch": 2},
}


def events(folder: Path) -> int:
    return len((folder / "journal.jsonl").read_text().splitlines())


def test_learning_killed_after_every_event(checkpoint, text, helpers, tmp_path):
    recipe = helpers.recipe(checkpoint("llama"), [LEARNING], text)
    compress.run(recipe, tmp_path / "whole")
    deaths, alive = 0, False
    while not alive:
        try:
            with killed_at(2, written=False):  # one event a life
                compress.run(recipe, tmp_path / "killed")
            alive = True
        except Killed:
            deaths += 1
    assert deaths >= events(tmp_path / "whole") - 2
    same(helpers, tmp_path)


def same(helpers, folder: Path) -> None:
    whole = helpers.contents(folder / "whole" / "model")
    assert helpers.contents(folder / "killed" / "model") == whole
    left = {p.name for p in (folder / "killed").iterdir()}
    assert left == {p.name for p in (folder / "whole").iterdir()}


@pytest.fixture(scope="module")
def two_steps(checkpoint, text, helpers, tmp_path_factory):
    """A recipe of two steps, with an evaluation, and an undisturbed run of it."""
    recipe = helpers.recipe(
        checkpoint("llama"), TWO_STEPS, text, evaluation=helpers.evaluation(text)
    )
    folder = tmp_path_factory.mktemp("two") / "whole"
    compress.run(recipe, folder)
    return recipe, folder


# Before and after events of each kind: amidst a survey or a solving pass, at the end of a step.
@pytest.mark.parametrize("number", [1, 4, 5, 8, 9, 12, 13, 14])
def test_killed_at_an_event_of_two_steps(number, two_steps, helpers, tmp_path):
    recipe, whole = two_steps
    total = events(whole)
    assert total == 15
    with pytest.raises(Killed), killed_at(number, written=number % 2 == 0):
        compress.run(recipe, tmp_path / "killed")
    result = compress.run(recipe, tmp_path / "killed")
    assert helpers.contents(result.model) == helpers.contents(whole / "model")
    # One event is lost at most: what had been done is not done again.
    assert events(result.folder) == total
    # started, 3 blocks surveyed, 3 solved, step; 3 solved, step; written, verified, done
    resumed = [step.resumed for step in result.report.steps]
    done = number - (number % 2)  # events that were on disk when it died
    assert resumed == [1 < done < 8, 8 < done < 12] or done >= 14


def test_time_and_memory_are_those_of_all_processes(two_steps, tmp_path, monkeypatch):
    recipe, _ = two_steps
    monkeypatch.setattr("compress.engine.step_clock._EVERY", 0.0)
    with pytest.raises(Killed), killed_at(11, written=False):
        compress.run(recipe, tmp_path / "killed")
    (noted,) = (tmp_path / "killed" / "work").glob("01-time.json")
    known = json.loads(noted.read_text())
    assert known["seconds"] > 0 and known["peak_bytes"] > 0
    noted.write_text(json.dumps({**known, "seconds": 1000.0, "peak_bytes": 10**15}))
    first, second = compress.run(recipe, tmp_path / "killed").report.steps
    assert second.seconds > 1000 > first.seconds
    assert second.peak_rss_bytes == 10**15 > first.peak_rss_bytes


def test_a_damaged_note_of_time_counts_for_nothing(two_steps, helpers, tmp_path):
    recipe, whole = two_steps
    with pytest.raises(Killed), killed_at(11, written=False):
        compress.run(recipe, tmp_path / "killed")
    (tmp_path / "killed" / "work" / "01-time.json").write_text('{"seconds": ')
    result = compress.run(recipe, tmp_path / "killed")
    assert helpers.contents(result.model) == helpers.contents(whole / "model")


def test_what_a_line_vouches_for_outlives_a_power_cut(
    checkpoint, text, helpers, tmp_path, monkeypatch
):
    """Renamed files count as lost until their content and then their folder were synced."""
    loose, lost, lines = {}, [], []
    replace, fsync = os.replace, os.fsync

    def replacing(source, target):
        replace(source, target)
        target = Path(target).absolute()
        for moved in [t for t in loose if Path(source).absolute() in t.parents]:
            del loose[moved]
        inside = [p for p in target.rglob("*") if p.is_file()] if target.is_dir() else [target]
        loose[target] = [path for path in inside if path.stat().st_ino not in synced]

    def syncing(descriptor):
        fsync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.add(os.fstat(descriptor).st_ino)
        if path.name == "journal.jsonl":
            lines.append(path)
            lost.extend(loose)
        for target in [t for t, unsynced in loose.items() if t.parent == path and not unsynced]:
            del loose[target]

    synced: set[int] = set()
    monkeypatch.setattr(os, "replace", replacing)
    monkeypatch.setattr(os, "fsync", syncing)
    compress.run(helpers.recipe(checkpoint("llama"), [LEARNING], text), tmp_path / "run")
    assert len(lines) > 8 and not lost


def test_killed_between_block_and_journal(two_steps, helpers, tmp_path, monkeypatch):
    """The block's file is there, nobody has acknowledged it: it is computed again."""
    recipe, whole = two_steps
    store, calls = JournalSink.store, []

    def dying(self, stage, index, block, anatomy):
        store(self, stage, index, block, anatomy)
        calls.append(index)
        if len(calls) == 5:
            raise Killed

    monkeypatch.setattr(JournalSink, "store", dying)
    with pytest.raises(Killed):
        compress.run(recipe, tmp_path / "killed")
    compress.run(recipe, tmp_path / "killed")
    assert calls == [0, 1, 2, 0, 1, 1, 2]
    assert helpers.contents(tmp_path / "killed/model") == helpers.contents(whole / "model")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def swap(work: Path) -> None:
    first, second = sorted(work.glob("01-gptq/block-*"))[:2]
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)


DAMAGE = {
    "activations changed": lambda work: [flip(p) for p in (work / "activations").iterdir()],
    "activations gone": lambda work: [p.unlink() for p in (work / "activations").iterdir()],
    "bit of a block": lambda work: flip(work / "01-gptq/block-00000.safetensors"),
    "bit of a block that enters the step": lambda work: flip(
        work / "00-ffn_width/block-00001.safetensors"
    ),
    "block lost its end": lambda work: os.truncate(work / "01-gptq/block-00001.safetensors", 900),
    "two blocks swapped": swap,
    "work folder gone": shutil.rmtree,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_was_lost_is_done_again(damage, two_steps, helpers, tmp_path):
    recipe, whole = two_steps
    with pytest.raises(Killed), killed_at(11, written=False):
        compress.run(recipe, tmp_path / "killed")
    DAMAGE[damage](tmp_path / "killed" / "work")
    result = compress.run(recipe, tmp_path / "killed")
    assert helpers.contents(result.model) == helpers.contents(whole / "model")
    assert '"rewind"' in (tmp_path / "killed/journal.jsonl").read_text()


DYING = """
import os, signal, sys
import torch
torch.set_num_threads(1)
place = sys.argv.pop(1)
if place == "event":
    from compress.engine.workspace import Workspace
    append, seen = Workspace.append, []
    def dying(self, event):
        append(self, event)
        seen.append(event)
        if len(seen) == 9:
            os.kill(os.getpid(), signal.SIGKILL)
    Workspace.append = dying
else:
    from compress.system.shards import ShardWriter
    write, seen = ShardWriter.write, []
    def dying(self, name, tensor):
        write(self, name, tensor)
        seen.append(name)
        if len(seen) == 9:
            os.kill(os.getpid(), signal.SIGKILL)
    ShardWriter.write = dying
from compress.cli.app import main
main(sys.argv[1:])
"""


def test_sigkill(two_steps, forked_python, helpers, tmp_path):
    """For real: no handler runs, locks and half-written files stay as they are."""
    recipe, whole = two_steps
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    root = str(Path(compress.__file__).parents[1])
    processes = {
        place: forked_python.start(
            "-c", DYING, place, "run", tmp_path / "recipe.yaml", "--out", tmp_path / place,
            "--quiet", env={"PYTHONPATH": root},
        )
        for place in ("event", "shard")
    }  # fmt: skip
    for place, process in processes.items():
        assert process.wait().returncode == -signal.SIGKILL
        assert not (tmp_path / place / "model").exists()
        result = compress.run(tmp_path / "recipe.yaml", tmp_path / place)
        assert helpers.contents(result.model) == helpers.contents(whole / "model")
    assert not list(tmp_path.rglob("*.partial")) and not list(tmp_path.rglob("*.tmp"))
