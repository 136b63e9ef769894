"""Whether lm-eval has a task of a name, without building its index (ten seconds)."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from compress.errors import CompressError, did_you_mean
from compress.eval.quality.local_tasks import local_tasks
from compress.eval.quality.user_tasks import user_tasks

# Tasks, groups and tags, alone or as items of a list.
_NAMED = re.compile(r"^[ \t]*(?:-[ \t]+)?(?:task|group|tag)[ \t]*:[ \t]*([^#\n]+)", re.M)
_ITEM = re.compile(r"^[ \t]*-[ \t]+([\w.:/+-]+)[ \t]*$", re.M)


def check_task_names(names: Sequence[str], include_path: Sequence[str] = ()) -> None:
    """Refuse names that are no task, group or tag of lm-eval or of the user's files, and files that
    hold none, before any work is done.

    lm-eval itself, which knows better what its files mean, has the last word when tasks run.

    Args:
        include_path: folders with tasks of the user's.

    Raises:
        CompressError: naming the closest tasks; what :func:`user_tasks` raises.
    """
    own = user_tasks(names, include_path)
    for task in own.named.values():
        task.data_files()
    for name in own.resolved(names):
        if name in own.names or name in local_tasks() or _has_file(name) or not _files():
            continue
        if name not in _all_names():
            raise unknown_task(name, (*_all_names(), *own.names))


def unknown_task(name: str, known: Iterable[str]) -> CompressError:
    """The error for a name that no task has; there are thousands, so it names the nearest."""
    return CompressError(
        "the name of an lm-eval task", repr(name)[:80],
        did_you_mean(name[:80], sorted({*known, *local_tasks()})),
    )  # fmt: skip


def _has_file(name: str) -> bool:
    """Most tasks have a file of their name, and groups one with an underscore in front."""
    return any(
        name in _names_in(path) for stem in (name, f"_{name}") for path in _files().get(stem, ())
    )


@functools.cache
def _files() -> dict[str, list[Path]]:
    """lm-eval's YAML files by stem; empty where it is not installed."""
    found: dict[str, list[Path]] = {}
    spec = importlib.util.find_spec("lm_eval")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        for folder, _, files in os.walk(Path(root) / "tasks"):
            for file in files:
                stem, suffix = os.path.splitext(file)
                if suffix in (".yaml", ".yml"):
                    found.setdefault(stem, []).append(Path(folder) / file)
    return found


@functools.cache
def _all_names() -> frozenset[str]:
    return frozenset().union(*(_names_in(p) for paths in _files().values() for p in paths))


def _names_in(path: Path) -> set[str]:
    text = path.read_text(encoding="utf-8", errors="replace")
    named = " ".join(_NAMED.findall(text))
    return {*re.findall(r"[\w.:/+-]+", named), *_ITEM.findall(text)}
