"""Carry out a plan in a folder: resumable, locked, verified, reported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress import distributed, memory
from compress.errors import CompressError
from compress.intact import check_finished, check_source
from compress.job import Job, device_of
from compress.planner import Plan, plan
from compress.progress import Progress
from compress.recipe import Recipe
from compress.workspace import Workspace


@dataclass(frozen=True)
class RunResult:
    """What a run left.

    Attributes:
        folder: the run's folder. model: the checkpoint in it.
        report: the compress.eval.Report, None where the recipe has no evaluation.
        seconds: of all steps. peak_bytes: highest resident memory of any step.
    """

    folder: Path
    model: Path
    report: Any
    seconds: float
    peak_bytes: int


def run(
    recipe: Recipe,
    out: str | Path,
    *,
    data_root: str | Path | None = None,
    max_memory: int | None = None,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> RunResult:
    """Compress, verify, evaluate and report. Run it again after any interruption: it goes on.

    Args:
        recipe: parsed.
        out: the run's folder: new, empty, or of the same recipe.
        data_root: folder with local copies of data sets.
        max_memory: bytes of resident memory that may be used; refused beforehand where the plan
            predicts more, stopped where the run takes more.
        cache_dir: where fetched models are kept.
        progress: where to tell how far it is.
        command: the command line, for the report.

    Raises:
        CompressError: anything that makes the run impossible; finished blocks are kept.
    """
    progress = progress or Progress(quiet=True)
    workspace = Workspace(Path(out))
    _refuse_source_inside(recipe, workspace.folder)
    distributed.refuse_sharding()
    if distributed.launched().rank > 0:
        from compress.follower import follow

        follow(recipe, workspace, data_root, max_memory, cache_dir)
        workspace.read()
        return _finished(workspace)
    with distributed.alone(), workspace:
        if workspace.claimed:
            workspace.claim(recipe.to_yaml())
        report = None
        if workspace.find(event="done") and _still_complete(recipe, workspace, progress):
            progress.say(f"{out} is complete; nothing to do")
        else:
            made = planned(recipe, workspace, data_root, max_memory, cache_dir, progress)
            job = Job(made, workspace, data_root, max_memory, progress, command)
            job.prepare()
            job.evaluate_before()
            job.compress()
            job.write()
            report = job.report()
            workspace.append({"event": "done"})
            workspace.clean()
        distributed.tell(None)
        return _finished(workspace, report)


def _refuse_source_inside(recipe: Recipe, folder: Path) -> None:
    """A run replaces ``model`` and removes ``work`` in its folder: nothing else may live there."""
    train = recipe.model.train
    name = recipe.model.source if train is None else train.from_
    if name and Path(name).expanduser().exists():
        home = Path(name).expanduser().resolve()
        if home.is_relative_to(folder.resolve()):
            raise CompressError(
                "an output folder that does not hold the model that is to be compressed",
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


def planned(
    recipe: Recipe,
    workspace: Workspace,
    data_root: str | Path | None,
    max_memory: int | None,
    cache_dir: str | Path | None,
    progress: Progress,
) -> Plan:
    """The plan of a run; a model that the recipe trains first is trained where it is not yet."""
    options = {"max_memory": max_memory, "cache_dir": cache_dir, "data_root": data_root}
    made = plan(recipe, **options)
    if recipe.model.train is None:
        return made
    from compress.create.create import create_for

    workspace.claim(recipe.to_yaml())
    trained = create_for(
        recipe, workspace, device_of(recipe.device), data_root, cache_dir, progress,
        guard=lambda: memory.check_limit(max_memory),
    )  # fmt: skip
    return plan(recipe, trained=trained, **options)


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
    )
