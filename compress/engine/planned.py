"""What a run is to do, for the process that carries it out and for those that take part."""

from __future__ import annotations

from pathlib import Path

from compress.engine.job import settled_precision
from compress.engine.workspace import Workspace
from compress.planning.planner import Plan, plan
from compress.planning.recipe import Recipe
from compress.system import memory
from compress.system.precision import device_of
from compress.system.progress import Progress


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
    from compress.train.create.create import create

    workspace.claim(recipe.to_yaml())
    if progress.log is not None:
        progress.log.begin()
    device = device_of(recipe.device)
    trained = create(
        recipe.model.train, workspace.folder / "base", workspace.work / "base", seed=recipe.seed,
        data_root=data_root, cache_dir=cache_dir, device=device, progress=progress,
        guard=lambda: memory.check_limit(max_memory),
        precision=settled_precision(workspace, recipe, device),
    )  # fmt: skip
    return plan(recipe, trained=trained, **options)
