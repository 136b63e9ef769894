"""The processes of a run that only train: they wait for a training and take part in it."""

from __future__ import annotations

from pathlib import Path

from compress.engine.job import Job
from compress.engine.mended import as_begun
from compress.engine.planned import planned
from compress.engine.sink import ReadingSink
from compress.engine.steps import run_step
from compress.engine.workspace import Workspace
from compress.planning.recipe import Recipe
from compress.system import processes
from compress.system.progress import Progress


def follow(
    recipe: Recipe,
    workspace: Workspace,
    data_root: str | Path | None,
    max_memory: int | None,
    cache_dir: str | Path | None,
) -> None:
    """Take part in each training that the first process calls to, until it needs no more.

    All that such a training starts from is in the run's folder, which all processes see: this one
    builds the same model from the same journal and files, and writes nothing.

    Raises:
        CompressError: the first process has ended before its time, or what a training raises.
    """
    job = None
    while (number := processes.next_task()) is not None:
        workspace.read()
        with processes.alone():
            if job is None:
                quiet, recipe = Progress(quiet=True), as_begun(recipe, workspace.recipe)
                made = planned(recipe, workspace, data_root, None, cache_dir, quiet)
                job = Job(made, workspace, data_root, max_memory, quiet, None)
                job.calibrate()
        take_part(job, number)


def take_part(job: Job, number: int) -> None:
    """Train with the process that carries out step ``number`` of the recipe."""
    entered = job.state
    for earlier in range(number + 1):
        source = job.state.streamed(job.device)
        sink = job.sink(earlier, source, ReadingSink)
        run_step(job.recipe.steps[earlier], job.context(source, sink), joining=True)
        job.state = sink.state
    job.state = entered
