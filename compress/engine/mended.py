"""What a recipe means for a started run, and which changes of it the run can take over: those that
decide nothing done so far."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError
from compress.planning import recipe_yaml

if TYPE_CHECKING:
    from compress.planning.recipe import Recipe

# What is measured and what it is called decides nothing about the model.
_FREE = ("name", "description", "expected", "evaluation")


def as_begun(recipe: Recipe, path: Path) -> Recipe:
    """The recipe with what it meant to the version that began the run of a recipe.yaml.

    A run writes every option of these sections there. Where ``special_tokens`` is missing, the
    version had no such option and put nothing around the windows of a stream.
    """
    written = _plain(_read(path))
    train = _as_begun(recipe.model.train, written, "model", "train")
    model = recipe.model.model_copy(update={"train": train})
    calibration = _as_begun(recipe.calibration, written, "calibration")
    return recipe.model_copy(update={"model": model, "calibration": calibration})


def _as_begun(section: Any, written: Any, *place: str) -> Any:
    """A section of a recipe, as :func:`as_begun` has it.

    Args:
        section: now; None where there is none.
        written: what recipe.yaml holds.
        place: keys that lead to the section there.
    """
    for key in place:
        written = written.get(key) if isinstance(written, dict) else None
    if section is None or not isinstance(written, dict) or "special_tokens" in written:
        return section
    if section.text is None or section.packing != "stream":
        return section
    if "special_tokens" in section.model_fields_set:
        return section
    return section.model_copy(update={"special_tokens": False})


def resolved(path: Path) -> str:
    """A run's recipe.yaml, with the options that came up since it was written: at their defaults,
    or at what was done before there was the option.

    Raises:
        CompressError: it is no YAML mapping.
    """
    from compress.planning.recipe import read_recipe

    try:
        # Not its imports: whoever runs a recipe in a folder has not asked for the code of another.
        return as_begun(read_recipe(path, run=False), path).to_yaml()
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
