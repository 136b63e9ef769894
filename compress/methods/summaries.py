"""The one-line summary of a class, read from its source: a listing must not import it."""

from __future__ import annotations

import ast
import importlib.util
from importlib.machinery import ModuleSpec, PathFinder


def written_summary(module: str, attribute: str) -> str:
    """The text that a class assigns to ``summary`` in its body.

    Args:
        module: dotted name; neither it nor the packages around it are imported.
        attribute: name of the class in it.

    Returns:
        An empty string where there is no such module, class or text (it may be computed, inherited
        or imported from elsewhere).
    """
    try:
        spec = _spec(module)
        tree = ast.parse(spec.loader.get_source(spec.name))
    except (ImportError, AttributeError, SyntaxError, ValueError, TypeError, OSError):
        return ""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == attribute:
            return next(filter(None, map(_summary, node.body)), "")
    return ""


def _spec(module: str) -> ModuleSpec | None:
    """Where a module lies. ``importlib.util.find_spec`` would import the packages around it."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    for part in rest:
        spec = PathFinder.find_spec(f"{spec.name}.{part}", spec.submodule_search_locations)
    return spec


def _summary(statement: ast.stmt) -> str:
    targets = getattr(statement, "targets", [getattr(statement, "target", None)])
    names = {getattr(target, "id", None) for target in targets}
    value = getattr(statement, "value", None)
    if "summary" in names and isinstance(value, ast.Constant) and isinstance(value.value, str):
        return value.value
    return ""
