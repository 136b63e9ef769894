"""Carry out a plan in a folder: resumable, locked, verified, reported."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.engine.intact import check_finished, check_source
from compress.engine.job import Job
from compress.engine.mended import as_begun
from compress.engine.planned import planned
from compress.engine.run_exports import exported_places
from compress.engine.workspace import Workspace
from compress.errors import CompressError
from compress.planning.recipe import Recipe
from compress.system import processes
from compress.system.imports import is_file
from compress.system.intake import at_home
from compress.system.progress import Progress, showing

LOG = "run.log"


@dataclass(frozen=True)
class RunResult:
    """What a run left.

    Attributes:
        folder: the run's folder. model: the checkpoint in it.
        exports: format -> what the result was exported to.
        report: the compress.eval.Report, None where the recipe has no evaluation.
        seconds: of all steps. peak_bytes: highest resident memory of any step.
    """

    folder: Path
    model: Path
    report: Any
    seconds: float
    peak_bytes: int
    exports: dict[str, Path] = field(default_factory=dict)


def run(
    recipe: Recipe,
    out: str | Path,
    *,
    data_root: str | Path | None = None,
    max_memory: int | None = None,
    cache_dir: str | Path | None = None,
    progress: Progress | bool | None = None,
    command: str | None = None,
) -> RunResult:
    """Compress, verify, evaluate and report. Run it again after any interruption: it goes on.

    Args:
        recipe: parsed.
        out: the run's folder: new, empty, or of the same recipe.
        data_root: folder with local copies of data sets.
        max_memory: bytes of resident memory that may be used; refused beforehand where the plan
            predicts more, stopped where the run takes more.
        cache_dir: where fetched models and figures of originals are kept.
        progress: where to tell how far it is; True, False, or None: where somebody watches, which
            is a terminal or a notebook. ``run.log`` in the folder has all of it in any case.
        command: the command line, for the report.

    Raises:
        CompressError: anything that makes the run impossible; finished blocks are kept.
    """
    with showing(progress) as told:
        return _run(recipe, Workspace(Path(out)), data_root, max_memory, cache_dir, told, command)


def _run(
    recipe: Recipe,
    workspace: Workspace,
    data_root: str | Path | None,
    max_memory: int | None,
    cache_dir: str | Path | None,
    progress: Progress,
    command: str | None,
) -> RunResult:
    _refuse_inputs_inside(recipe, workspace.folder)
    processes.refuse_sharding()
    if processes.launched().rank > 0:
        from compress.engine.follower import follow

        follow(recipe, workspace, data_root, max_memory, cache_dir)
        workspace.read()
        return _finished(workspace)
    with processes.alone(), workspace, progress.logged(workspace.folder / LOG):
        if workspace.claimed:
            recipe = as_begun(recipe, workspace.recipe)
            workspace.claim(recipe.to_yaml())
        report = None
        if workspace.find(event="done") and _still_complete(recipe, workspace, progress):
            progress.say(f"{workspace.folder} is complete; nothing to do")
        else:
            made = planned(recipe, workspace, data_root, max_memory, cache_dir, progress)
            for warning in made.warnings:
                progress.say(f"note: {warning}")
            job = Job(made, workspace, data_root, max_memory, progress, command, cache_dir)
            job.prepare()
            job.evaluate_before()
            job.compress()
            job.write()
            job.export()
            report = job.report()
            workspace.append({"event": "done"})
            workspace.clean()
        processes.tell(None)
        return _finished(workspace, report)


def _refuse_inputs_inside(recipe: Recipe, folder: Path) -> None:
    """Refuse inputs in the run's folder: it replaces ``model`` there and removes ``work``."""
    train = recipe.model.train
    names = [recipe.model.source if train is None else train.from_]
    for spec in (recipe.calibration, train):
        names += [read.source for read in (spec and spec.text, spec and spec.examples) if read]
    for part in ("text", "examples"):
        read = (recipe.evaluation or {}).get(part)
        names.append(read.get("source") if isinstance(read, dict) else read)
    names += [str(path) for method in recipe.steps for path in method.files()]
    names += filter(is_file, recipe.imports)
    for name in names:
        if not isinstance(name, str) or not name or not os.path.exists(at_home(name)):
            continue
        if at_home(name).resolve().is_relative_to(folder.resolve()):
            raise CompressError(
                "an output folder that does not hold what the run is to read",
                f"{name} inside {folder}",
                "Choose another folder with --out",
            )


def _still_complete(recipe: Recipe, workspace: Workspace, progress: Progress) -> bool:
    """Whether a run that once was complete still is.

    Raises:
        CompressError: its model is not what it wrote, or its source is another one now.
    """
    if not check_finished(workspace):
        progress.say(f"note: {workspace.notes[-1]}")
        return False
    check_source(recipe, workspace)
    if recipe.evaluation is not None and not (workspace.folder / "report.json").exists():
        workspace.rewind(workspace.find(event="done")[0], "the report was removed")
        progress.say("note: the report was removed, so it is made again")
        return False
    return True


def _finished(workspace: Workspace, report: Any = None) -> RunResult:
    if report is None and (workspace.folder / "report.json").exists():
        from compress.eval.report import load_report

        report = load_report(workspace.folder / "report.json")
    steps = workspace.find(event="step")
    return RunResult(
        workspace.folder,
        workspace.model,
        report,
        sum(s["seconds"] for s in steps),
        max([s["peak_bytes"] for s in steps], default=0),
        exported_places(workspace),
    )


def kept(folder: Path) -> str:
    """What an interrupted run has left and how to go on, as a sentence."""
    workspace = Workspace(folder)
    workspace.read()
    if not workspace.claimed:
        return f"nothing was begun in {folder}; the same command starts again"
    last = next((e for e in reversed(workspace.events) if e["event"] != "started"), {})
    if "block" in last:
        found = workspace.find(event="block", step=last["step"], stage=last["stage"])
        done = sum(event.get("blocks", 1) for event in found)
        what = f"{done} finished blocks of step {last['step'] + 1} ({last['stage']})"
    elif last.get("event") == "step":
        what = f"everything up to the end of step {last['step'] + 1} ({last['method']})"
    elif last.get("event") in ("written", "verified", "exported", "done"):
        what = "the compressed model"
    else:
        what = "what was prepared"
    if any(workspace.work.glob("**/checkpoint.safetensors")):
        what += " and the last checkpoint of the training"
    return f"kept in {folder}: {what}; the same command goes on from there"
