"""lm-eval tasks whose data lies under a data root: YAML in ``eval/tasks`` to a task dictionary.

A file there is an lm-eval task with four keys of ours, which are resolved and removed:

    files      split -> path below the data root
    reader     how a file becomes documents: ``jsonl`` (default) or ``wikitext_pages``
    functions  task key -> ``module:function`` (lm-eval's ``!function`` cannot reach other packages)
    aliases    other names of the task

The data reaches lm-eval as a function (``custom_dataset``), so that no path is written into a file
and nothing is copied into the cache of ``datasets``.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compress.errors import CompressError

TASK_FOLDER = Path(__file__).parent.parent / "tasks"
_TITLE = re.compile(r"^ = [^=].* = $")


@functools.cache
def local_tasks(folder: Path = TASK_FOLDER) -> dict[str, Path]:
    """Return every name (aliases too) of a local task and its YAML file."""
    import yaml

    names: dict[str, Path] = {}
    for path in sorted(folder.glob("*.yaml")):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        for name in (config["task"], *config.get("aliases", ())):
            names[name] = path
    return names


def resolve(path: Path, data_root: Path, task_name: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Turn a local YAML file into lm-eval's task dictionary.

    Args:
        path: the YAML file.
        data_root: folder that the paths under ``files`` are relative to.
        task_name: name for messages.

    Returns:
        The dictionary, and the sha256 of each data file by its path below the root.

    Raises:
        CompressError: a data file is missing.
    """
    import yaml

    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    config.pop("aliases", None)
    files: dict[str, str] = config.pop("files")
    read = READERS[config.pop("reader", "jsonl")]
    for key, target in config.pop("functions", {}).items():
        module, _, name = target.partition(":")
        config[key] = getattr(importlib.import_module(module), name)
    for relative in files.values():
        if not (data_root / relative).is_file():
            raise CompressError(
                f"the data of task {task_name!r} at {relative} under the data root",
                f"no such file in {data_root}",
                "Point --data-root at a folder that holds it, or leave it out to use the hub",
            )

    def load(**_: Any) -> Any:
        import datasets

        return datasets.DatasetDict(
            {
                split: datasets.Dataset.from_list(read(data_root / relative))
                for split, relative in files.items()
            }
        )

    config["custom_dataset"] = load
    digests = {
        relative: hashlib.sha256((data_root / relative).read_bytes()).hexdigest()
        for relative in files.values()
    }
    return config, digests


def _jsonl(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def _wikitext_pages(path: Path) -> list[dict[str, Any]]:
    """Cut a raw WikiText file into articles; a top-level title begins one."""
    pages: list[list[str]] = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if _TITLE.match(line.rstrip("\n")) or not pages:
                pages.append([])
            pages[-1].append(line)
    return [{"page": text} for page in pages if (text := "".join(page)).strip()]


READERS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    "jsonl": _jsonl,
    "wikitext_pages": _wikitext_pages,
}
