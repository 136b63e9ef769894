"""A run's result in the formats of other runtimes, in the run's folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from compress.engine.exporting import export
from compress.engine.intact import digests
from compress.engine.runtimes import place_of
from compress.engine.workspace import Workspace
from compress.planning.recipe import Recipe
from compress.system.files import files_below
from compress.system.progress import Progress


def export_result(workspace: Workspace, recipe: Recipe, result: Path, progress: Progress) -> None:
    """Write what ``output.exports`` names, each once; the journal vouches for its files.

    Args:
        result: folder of the checkpoint.

    Raises:
        CompressError: what the exporters raise, and a plan could not foresee.
    """
    for spec in recipe.output.exports:
        if workspace.find(event="exported", to=spec.to):
            continue
        place = place_of(spec.to, workspace.folder)
        _remove(place)  # written whole by a start that ended before it could say so
        progress.say(f"exporting to {spec.to}")
        made = export(
            result, spec.to, place, type=spec.type, embeddings=spec.embeddings,
            activations=spec.activations, trust_remote_code=recipe.model.trust_remote_code,
        )  # fmt: skip
        for line in made.told():
            progress.say(line)
        files = files_below(place) if place.is_dir() else [place]
        workspace.append(
            {"event": "exported", "to": spec.to, "files": digests(files, workspace.folder)}
        )


def exported_places(workspace: Workspace) -> dict[str, Path]:
    """Format -> what a run has exported to it."""
    found = (event["to"] for event in workspace.find(event="exported"))
    return {to: place_of(to, workspace.folder) for to in found}


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
