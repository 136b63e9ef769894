"""Recipes as files: those of the user and those that come with the package, as plain data.

Imports nothing heavy: a name that is misspelled is told before torch is there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import compress
from compress.errors import CompressError, did_you_mean
from compress.planning import recipe_yaml
from compress.planning.overrides import override


def read_data(name: str | Path, overrides: list[str] | None = None) -> tuple[dict[str, Any], Path]:
    """Read a recipe by path or by the name of a shipped one, with ``key.path=value`` overrides.

    Returns:
        What it says, unchecked, and its file.

    Raises:
        CompressError: no such file or recipe, YAML that does not parse, an override of nothing.
    """
    path = find_recipe(name)
    data = recipe_yaml.read(path)
    for text in overrides or []:
        override(data, text)
    return data, path


def find_recipe(name: str | Path) -> Path:
    """Return the file of a recipe given by path or name."""
    path = Path(name)
    if path.is_file():
        return path
    known = shipped_recipes()
    if str(name) in known:
        return known[str(name)]
    raise CompressError(
        "a recipe file or the name of a shipped recipe", repr(str(name)),
        did_you_mean(str(name), sorted(known)),
    )  # fmt: skip


def shipped_recipes() -> dict[str, Path]:
    """Recipes that come with the package, by name (path below recipes/ without .yaml)."""
    package = Path(compress.__file__).parent
    # In an installed wheel recipes lie inside the package, in a checkout beside it.
    for root in (package / "recipes", package.parent / "recipes"):
        if root.is_dir():
            return {
                p.relative_to(root).with_suffix("").as_posix(): p
                for p in sorted(root.rglob("*.yaml"))
            }
    return {}
