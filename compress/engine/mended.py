"""Which changes of a recipe a started run can take over: those that decide nothing done so far."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.planning import recipe_yaml

# What is measured and what it is called decides nothing about the model.
_FREE = ("name", "description", "expected", "evaluation")


def resolved(path: Path) -> str:
    """A run's recipe.yaml, with the options that came up since it was written at their defaults.

    Raises:
        CompressError: it is no YAML mapping.
    """
    from compress.planning.recipe import read_recipe

    try:
        # Not its imports: whoever runs a recipe in a folder has not asked for the code of another.
        return read_recipe(path, run=False).to_yaml()
    except CompressError as error:
        text = _read(path)
        if not isinstance(_plain(text), dict):
            raise CompressError(
                f"the recipe that {path.parent} was started with in {path.name}",
                "a damaged file" if text is None else "no recipe",
                f"Remove {path} to go on with the recipe that you give, or choose another folder "
                "with --out",
            ) from error
        return text


def changed_parts(earlier: str, now: str, events: list[dict[str, Any]]) -> list[str]:
    """Names of the parts that differ, all of them free to.

    Args:
        earlier, now: recipes as YAML.
        events: what the run has done.

    Raises:
        CompressError: a difference decides what has been done; the message shows it.
    """
    then, new = _plain(earlier), _plain(now)
    done = any(e["event"] == "done" for e in events)
    if (then != new) if done else (_fixed(then, events) != _fixed(new, events)):
        difference = difflib.unified_diff(
            earlier.splitlines(), now.splitlines(), "earlier", "now", n=0, lineterm=""
        )
        told = "\n".join(line for line in difference if not line.startswith("@@"))
        raise CompressError(
            "the recipe that this folder was started with",
            f"another one:\n{told}\n",
            "Choose another folder with --out, or undo the change",
        )
    return [k for k in {**then, **new} if then.get(k) != new.get(k)]


def begun(events: list[dict[str, Any]]) -> int:
    """Number of steps that have done something."""
    return 1 + max(
        (e["step"] for e in events if e["event"] in ("block", "outer", "step")), default=-1
    )


def _fixed(recipe: dict[str, Any], events: list[dict[str, Any]]) -> dict[str, Any]:
    """The parts that decide what has been done."""
    count = begun(events)
    written = any(e["event"] == "written" for e in events)
    if not count and not written:
        return {}
    fixed = {k: v for k, v in recipe.items() if k not in _FREE}
    if not written:
        fixed["steps"] = recipe.get("steps", [])[:count]
        output = recipe.get("output") or {}
        fixed["output"] = {k: v for k, v in output.items() if k != "max_shard_size"}
    return fixed


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _plain(text: str | None) -> Any:
    try:
        return None if text is None else recipe_yaml.parse(text)
    except ValueError:
        return None
