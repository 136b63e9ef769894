"""What a shell offers behind ``compress run`` and ``compress methods``; imports nothing heavy."""

from __future__ import annotations


def recipe_names(incomplete: str) -> list[str]:
    """Names of shipped recipes that begin so; files are the shell's business."""
    from compress.planning.recipe_files import shipped_recipes

    return [name for name in shipped_recipes() if name.startswith(incomplete)]


def method_names(incomplete: str) -> list[str]:
    """Names of methods that begin so, those of installed packages too."""
    from compress.methods.catalog import METHODS

    return [name for name in METHODS if name.startswith(incomplete)]
