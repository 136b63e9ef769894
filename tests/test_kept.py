"""What belongs to the user stays; what a run depends on is noticed when it changes."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import yaml

import compress
from compress.cli.app import main
from compress.conformance.interruption import Killed, killed_at
from compress.engine import workspace as workspace_module
from compress.engine.workspace import Workspace
from compress.errors import CompressError
from compress.models.sources.cache import cached_folder
from compress.system.files import new_file, new_folder, scratch_folder, whole_folder


@pytest.fixture
def interrupted():
    """``interrupted(recipe, folder, number)``: a run that dies behind its number-th event."""

    def start(recipe, folder: Path, number: int) -> None:
        with pytest.raises(Killed), killed_at(number, written=True):
            compress.run(recipe, folder)

    return start


# folders -----------------------------------------------------------------------------------------


def test_a_lock_makes_no_run_folder(checkpoint, helpers, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / ".lock").touch()
    (tmp_path / "work" / "thesis.tex").write_text("years of work")
    recipe = helpers.recipe(checkpoint("llama"), ["magnitude"])
    with pytest.raises(CompressError, match="other files"):
        compress.run(recipe, tmp_path)
    assert (tmp_path / "work" / "thesis.tex").read_text() == "years of work"


def test_an_unclaimed_folder_goes_with_all_that_was_made_for_it(tmp_path):
    (tmp_path / "there").mkdir()
    with Workspace(tmp_path / "there" / "a" / "run"):
        (tmp_path / "there" / "mine").touch()
    assert [p.name for p in (tmp_path / "there").iterdir()] == ["mine"]
    with Workspace(tmp_path / "new" / "run") as workspace:
        (workspace.folder / "thesis.tex").touch()
    assert [p.name for p in workspace.folder.iterdir()] == ["thesis.tex"]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / ".lock").touch()
    with Workspace(tmp_path / "old"):
        pass
    assert (tmp_path / "old" / ".lock").exists()  # another process made it


def test_a_claimed_folder_stays(tmp_path):
    with Workspace(tmp_path / "run") as workspace:
        workspace.claim("seed: 1\n")
    assert {p.name for p in workspace.folder.iterdir()} == {".lock", "recipe.yaml", "journal.jsonl"}


@pytest.mark.parametrize("folder_too", [False, True])
def test_a_lock_that_is_removed_before_it_is_held_is_taken_anew(tmp_path, monkeypatch, folder_too):
    """Between open and flock of one process, another may end and remove the file."""
    flock, path = workspace_module.fcntl.flock, tmp_path / "run" / ".lock"

    def late(descriptor, how):
        monkeypatch.setattr(workspace_module.fcntl, "flock", flock)
        path.unlink()
        if folder_too:
            path.parent.rmdir()
        flock(descriptor, how)

    monkeypatch.setattr(workspace_module.fcntl, "flock", late)
    with Workspace(tmp_path / "run"):
        assert path.exists()
        with pytest.raises(CompressError, match="another run"):
            Workspace(tmp_path / "run").__enter__()
        assert path.exists()  # whoever is refused removes nothing of the one at work
    assert list(tmp_path.iterdir()) == []


def test_source_inside_the_output_folder_is_refused(checkpoint, helpers, tmp_path):
    compress.run(helpers.recipe(checkpoint("llama"), ["magnitude"]), tmp_path)
    before = helpers.contents(tmp_path / "model")
    with pytest.raises(CompressError, match="does not hold what the run is to read"):
        compress.run(helpers.recipe(tmp_path / "model", ["magnitude"]), tmp_path)
    assert helpers.contents(tmp_path / "model") == before


def test_new_folder_replaces_nothing(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").touch()
    with new_folder(tmp_path / "out", "a thing") as partial:
        (partial / "file").write_text("new")
    assert (tmp_path / "out" / "file").read_text() == "new"
    with (
        pytest.raises(CompressError, match="not empty"),
        new_folder(tmp_path / "out", "x") as p,
    ):
        (p / "other").touch()
    assert {p.name for p in tmp_path.iterdir()} == {"out", "out.partial"}
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["file"]
    with pytest.raises(Killed), whole_folder(tmp_path / "out", "x", "") as p:
        raise Killed
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["file"]


def test_a_new_file_is_whole_or_not_there(tmp_path):
    out = tmp_path / "made" / "file"
    with (
        pytest.raises(
            CompressError, match="to write a thing to .*file, got full.*nothing was left"
        ),
        new_file(out, "a thing") as partial,
    ):
        partial.write_text("half")
        raise OSError("full")
    assert list(out.parent.iterdir()) == []
    with new_file(out, "a thing") as partial:
        partial.write_text("whole")
    assert [p.name for p in out.parent.iterdir()] == ["file"] and out.read_text() == "whole"


def test_scratch_of_the_dead_is_swept_and_of_the_living_not(tmp_path):
    with scratch_folder(tmp_path, "draft-") as living:
        (tmp_path / "draft-dead.compress-tmp").mkdir()
        (tmp_path / "draft-mine").mkdir()
        with scratch_folder(tmp_path, "draft-") as second:
            assert living.exists() and second != living
        assert {p.name for p in tmp_path.iterdir()} == {living.name, "draft-mine"}
    assert [p.name for p in tmp_path.iterdir()] == ["draft-mine"]


def test_links_out_of_the_model_folder_are_not_copied(own_checkpoint, helpers, tmp_path, capsys):
    source = own_checkpoint("llama")
    (tmp_path / "id_rsa").write_text("PRIVATE KEY")
    (source / "vocab_extra.txt").symlink_to(tmp_path / "id_rsa")
    (source / "LICENSE.short").write_text("free")
    (source / "LICENSE").symlink_to(source / "LICENSE.short")
    recipe = helpers.recipe(source, ["magnitude"])
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(SystemExit):
        main(["run", str(tmp_path / "recipe.json"), "-o", str(tmp_path / "run")])
    assert "note: vocab_extra.txt will not be copied" in capsys.readouterr().err
    assert (tmp_path / "run/model/LICENSE").read_text() == "free"
    assert not (tmp_path / "run/model/vocab_extra.txt").exists()


def test_a_hub_snapshot_given_as_a_folder_keeps_its_tokenizer(checkpoint, helpers, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b/snapshots/1234", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(checkpoint("llama"), blobs)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(Path("../../blobs") / blob.name)
    recipe = helpers.recipe(snapshot, ["magnitude"])
    assert not any("copied" in warning for warning in compress.plan(recipe).warnings)
    result = compress.run(recipe, tmp_path / "run")
    assert (result.model / "tokenizer.json").exists()


def test_reports_are_replaced_only_when_asked(tmp_path, capsys):
    page = tmp_path / "compare.html"
    page.write_text("mine")
    (tmp_path / "report.md").write_text("mine")
    for command in (["compare", "a", "-o", str(page)], ["evaluate", "m", "-o", str(tmp_path)]):
        with pytest.raises(SystemExit):
            main(command)
        assert "--overwrite" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["compare", "nowhere", "--overwrite", "-o", str(page)])
    assert "--overwrite" not in capsys.readouterr().err and page.read_text() == "mine"


def test_cached_conversions_are_hashed_again(checkpoint, tmp_path):
    built = []

    def build(folder: Path) -> dict[str, str]:
        built.append(folder)
        shutil.copytree(checkpoint("llama"), folder, dirs_exist_ok=True)
        return {"origin": "here"}

    cached_folder(tmp_path / "m", build)
    cached_folder(tmp_path / "m", build)
    path = tmp_path / "m" / "model.safetensors"
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert cached_folder(tmp_path / "m", build)["origin"] == "here" and len(built) == 2
    assert path.read_bytes() == (checkpoint("llama") / "model.safetensors").read_bytes()


# finished runs -----------------------------------------------------------------------------------


@pytest.fixture
def complete(own_checkpoint, text, helpers, tmp_path):
    source = own_checkpoint("llama")
    recipe = helpers.recipe(
        source, [{"method": "rtn", "group_size": 16}], evaluation=helpers.evaluation(text)
    )
    compress.run(recipe, tmp_path / "run")
    return recipe, source, tmp_path / "run"


def test_removed_model_is_made_again(complete, helpers):
    recipe, _, folder = complete
    before = helpers.contents(folder / "model")
    shutil.rmtree(folder / "model")
    result = compress.run(recipe, folder)
    assert helpers.contents(result.model) == before
    assert any("made again" in f.text for f in result.report.findings)
    (folder / "report.json").unlink()
    compress.run(recipe, folder)
    assert (folder / "report.json").exists()


def test_changed_model_or_source_is_not_complete(complete, tiny):
    recipe, source, folder = complete
    path = folder / "model" / "config.json"
    kept = path.read_text()
    path.write_text(kept.replace("0.02", "0.03"))
    with pytest.raises(CompressError, match="model/config.json does not hold what was written"):
        compress.run(recipe, folder)
    path.write_text(kept)
    compress.run(recipe, folder)
    tiny("llama", seed=1).save_pretrained(source)
    with pytest.raises(CompressError, match="not of these weights"):
        compress.run(recipe, folder)


# what a run depends on ---------------------------------------------------------------------------


def test_changed_config_is_refused(own_checkpoint, helpers, interrupted, tmp_path):
    source = own_checkpoint("llama")
    recipe = helpers.recipe(source, ["magnitude"])
    interrupted(recipe, tmp_path / "run", 2)
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_act": "relu"}))
    with pytest.raises(CompressError, match=r"the same config\.json"):
        compress.run(recipe, tmp_path / "run")


def test_changed_prior_is_refused(checkpoint, text, helpers, interrupted, tmp_path):
    magnitude = {"method": "magnitude", "pattern": "2:4"}
    first = compress.run(helpers.recipe(checkpoint("llama"), [magnitude]), tmp_path / "first")
    masks = tmp_path / "masks.safetensors"
    shutil.copy(first.model / "masks.safetensors", masks)
    step = {"method": "maskllm", "prior": str(masks), "training": None}
    recipe = helpers.recipe(checkpoint("llama"), [step], text)
    interrupted(recipe, tmp_path / "run", 2)
    data = bytearray(masks.read_bytes())
    data[-1] = 0
    masks.write_bytes(data)
    with pytest.raises(CompressError, match=r"the same .*masks\.safetensors \(step 1\)"):
        compress.run(recipe, tmp_path / "run")


def test_mended_recipe_goes_on(checkpoint, text, helpers, interrupted, tmp_path):
    steps = [{"method": "rtn", "group_size": 16}]
    spec = helpers.evaluation(text)
    recipe = helpers.recipe(checkpoint("llama"), steps, evaluation=spec)
    interrupted(recipe, tmp_path / "run", 3)  # started, two blocks
    for change in ({"seed": 3}, {"steps": [{"method": "rtn", "group_size": 8}]}):
        with pytest.raises(CompressError, match="another one"):
            compress.run({**recipe, **change}, tmp_path / "run")
    mended = {**recipe, "evaluation": {**spec, "window": 32}, "output": {"max_shard_size": "20kB"}}
    result = compress.run(mended, tmp_path / "run")
    assert result.report.before.perplexity.window == 32
    assert any("evaluation, output changed" in f.text for f in result.report.findings)
    assert (result.model / "model.safetensors.index.json").exists()
    lines = (tmp_path / "run" / "journal.jsonl").read_text().splitlines()
    assert sum('"event": "block"' in line for line in lines) == 3  # none was done twice
    assert (
        yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["evaluation"]["window"] == 32
    )
    with pytest.raises(CompressError, match="another one"):
        compress.run(recipe, tmp_path / "run")


def test_runs_that_earlier_versions_began_go_on(checkpoint, text, helpers, interrupted, tmp_path):
    recipe = helpers.recipe(checkpoint("llama"), [{"method": "gptq", "group_size": 16}], text)
    whole = compress.run(recipe, tmp_path / "whole")
    interrupted(recipe, tmp_path / "run", 3)
    journal, lock = (tmp_path / "run" / name for name in ("journal.jsonl", "lock.json"))
    new = ("check", "files", "lock", "recipe")
    events = [json.loads(line) for line in journal.read_text().splitlines()]
    for event in events:
        for name in new:
            event.pop(name, None)
        (event.get("activations") or {}).pop("file", None)
    journal.write_text("".join(json.dumps(event, sort_keys=True) + "\n" for event in events))
    locked = json.loads(lock.read_text())
    for name in ("config.json", "files beside the weights"):
        del locked["must"][name]
    lock.write_text(json.dumps(locked))
    result = compress.run(recipe, tmp_path / "run")
    assert helpers.contents(result.model) == helpers.contents(whole.model)
    assert len(journal.read_text().splitlines()) == 8  # nothing was done twice


# signals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_say_what_is_kept(number, checkpoint, helpers, tmp_path, monkeypatch, capsys):
    recipe = helpers.recipe(checkpoint("llama"), ["magnitude"])
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    append, seen = Workspace.append, []

    def stopping(self, event):
        append(self, event)
        seen.append(event)
        if len(seen) == 3:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Workspace, "append", stopping)
    outside = signal.signal(number, signal.SIG_DFL)  # in the background of a shell it is ignored
    try:
        with pytest.raises(SystemExit) as left:
            main(["run", str(path), "--out", str(tmp_path / "run"), "-q"])
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, outside)
    told = capsys.readouterr().err
    assert left.value.code == 128 + number
    assert told.count("\n") == 1 and "2 finished blocks of step 1" in told
    assert "the same command goes on" in told
    compress.run(recipe, tmp_path / "run")
    assert len(seen) == 8  # none was done twice: started, 3 blocks, step, written, verified, done
