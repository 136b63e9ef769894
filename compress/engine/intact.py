"""Whether what a run's journal vouches for is still there, and what to do where it is not.

Journal lines name the files that they tell of, with digests. A file that is gone or holds something
else (a power cut, a failing disk, a helping hand) takes its line back with all that follows: what
can be made again is made again, and nothing damaged ever becomes part of a result.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from compress.engine.workspace import Workspace
from compress.errors import CompressError
from compress.methods.passes import SOLVE
from compress.methods.questions import kind_of
from compress.planning.recipe import Recipe
from compress.system.files import content_digest, files_below
from compress.system.intake import at_home
from compress.system.tensors import TensorIndex, file_sha256

_GONE = "is gone"


def digests(paths: Iterable[Path], root: Path) -> dict[str, str]:
    """Path below ``root`` -> digest of the content."""
    return {path.relative_to(root).as_posix(): content_digest(path) for path in paths}


def model_digests(workspace: Workspace) -> dict[str, str]:
    """Of all files of the checkpoint that a run wrote."""
    return digests(files_below(workspace.model), workspace.folder)


def rewind_damaged(workspace: Workspace) -> list[str]:
    """Take back what the files in the folder do not bear out any more; returns why, as sentences.

    Only files that are still to be read are looked at: those of the step that goes on, those which
    earlier steps wrote of what enters it, and those of the result.
    """
    told = []
    while True:
        event = next((e for e in _needed(workspace) if _wrong(workspace.folder, e)), None)
        if event is None:
            return told
        names = _wrong(workspace.folder, event)
        why = f"{_listed(names)}, so it is made again"
        workspace.rewind(event, why)
        told.append(why)


def check_finished(workspace: Workspace) -> bool:
    """Whether a complete run still has its model and its report.

    A model or report that is gone is taken out of the journal, so that it is made again.

    Raises:
        CompressError: a file of the model is not the one that the run wrote. It may be somebody's
            work, so it is not replaced.
    """
    for event in workspace.find(event="exported"):
        wrong = _wrong(workspace.folder, event)
        if any(what != _GONE for what in wrong.values()):
            raise CompressError(
                f"the {event['to']} export that the run wrote in {workspace.folder}",
                _listed(wrong), "Move it away and run the same command again to have it made anew",
            )  # fmt: skip
        if wrong:
            workspace.rewind(event, f"{_listed(wrong)}, so it is exported again")
            return False
    for event in workspace.find(event="written"):
        wrong = _wrong(workspace.folder, event)
        if workspace.model.exists() and not wrong:
            continue
        if workspace.model.exists():
            raise CompressError(
                f"the model that the run wrote in {workspace.model}",
                _listed(wrong),
                "Move the folder model away and run the same command again to have it made anew, "
                "or choose another folder with --out",
            )
        # The blocks that it was assembled from went when the run was complete.
        first = next((e for e in workspace.events if e["event"] == "block"), event)
        workspace.rewind(first, "the model was removed, so it is made again")
        return False
    return True


def check_source(recipe: Recipe, workspace: Workspace) -> None:
    """Refuse to call a run complete whose source is a file or folder here that has changed since.

    Raises:
        CompressError: naming it.
    """
    name = recipe.model.source
    if name is None or not at_home(name).exists():
        return
    # Nothing is fetched or converted for that: what exists as a path is read where it is.
    path = at_home(name)
    then = workspace.locked("model")
    ggufs = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
    if path.is_file() or (ggufs and not (path / "config.json").exists()):
        now = {file_sha256(file) for file in ggufs}
    else:
        now = {TensorIndex.open(path).digest()}
    if then is not None and then not in now:
        raise CompressError(
            f"the weights in {path} that {workspace.folder} was made from",
            f"others (sha256 {min(now)} instead of {then})",
            "The run is complete, but not of these weights: choose another folder with --out for "
            "them, or put back what was there",
        )


def _needed(workspace: Workspace) -> list[dict[str, Any]]:
    """Events whose files are still to be read, in the order of the steps."""
    finished = {e["step"] for e in workspace.find(event="step")}
    with_files = [e for e in workspace.events if e.get("files")]
    # A pass may leave blocks to the one before it; the last one that wrote all of them counts.
    whole = {
        e["step"]
        for e in with_files
        if e["event"] == "block" and _stored(e) and e["step"] in finished
    } - _partial(workspace)
    entering = max(whole, default=-1)
    free = ("written", "outer", "exported")
    return [e for e in with_files if e["event"] in free or e["step"] >= entering]


def _partial(workspace: Workspace) -> set[int]:
    """Steps that wrote only some of their blocks."""
    return {e["step"] for e in workspace.find(event="block") if _left_alone(e)}


def _left_alone(event: dict[str, Any]) -> bool:
    return kind_of(event["stage"]) == SOLVE and not _stored(event)


def _stored(event: dict[str, Any]) -> bool:
    """Whether an event tells of a block, or several, whose weights are in files of the run."""
    return "record" in event or "records" in event


def _wrong(folder: Path, event: dict[str, Any]) -> dict[str, str]:
    """Files that an event vouches for and that are not so: path -> what is wrong."""
    wrong = {}
    for name, digest in event.get("files", {}).items():
        path = folder / name
        try:
            if content_digest(path) != digest:
                wrong[name] = "does not hold what was written"
        except FileNotFoundError:
            wrong[name] = _GONE
        except OSError as error:
            wrong[name] = f"cannot be read ({error.strerror})"
    return wrong


def _listed(wrong: dict[str, str]) -> str:
    name, what = next(iter(wrong.items()))
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return f"{name} {what}{more}"
