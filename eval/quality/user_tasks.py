"""lm-eval tasks of the user's own: YAML files by their path, or by name in folders of them.

A file is what lm-eval takes, with one convenience: paths of data files (``data_files`` of the
builders json, csv, parquet, text ...) start at the file's own folder, where lm-eval would look in
whatever folder the process runs in. For that a second file, which includes the user's and names
absolute paths, stands before it in lm-eval's search; nothing of the user's is written to.

Such files may name Python functions (``!function``), which run when the task does.
"""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from compress.errors import CompressError
from compress.system.intake import user_path
from compress.system.tensors import file_sha256

_SUFFIXES = (".yaml", ".yml")
# Modules of `datasets` that read files; any other `dataset_path` is a folder or on the hub.
_BUILDERS = ("json", "csv", "text", "parquet", "arrow", "pandas", "xml", "webdataset")


class _Plain(yaml.SafeLoader):
    """YAML as data: what a tag such as ``!function`` would make of a value is left out."""


_Plain.add_multi_constructor("!", lambda _loader, _tag, _node: None)


@dataclass(frozen=True)
class UserTask:
    """One YAML file.

    Attributes:
        path: of the file.
        config: what it says, files that it includes taken in.
        sources: the file and those that it includes.
    """

    path: Path
    config: Mapping[str, Any]
    sources: tuple[Path, ...]

    @property
    def name(self) -> str | None:
        """Of the task or group; None for a file that others include."""
        for key in ("group", "task"):
            if isinstance(self.config.get(key), str):
                return self.config[key]
        return None

    @property
    def tags(self) -> tuple[str, ...]:
        tags = self.config.get("tag") or ()
        return (tags,) if isinstance(tags, str) else tuple(tags)

    @property
    def needs_hub(self) -> bool:
        """Whether its data are on the hub, as far as the file tells."""
        place = self.config.get("dataset_path")
        if not isinstance(place, str) or "custom_dataset" in self.config:
            return False
        return place not in _BUILDERS and not Path(place).exists()

    def data_files(self) -> Any:
        """``data_files`` with absolute paths, patterns (``part-*.jsonl``) as the files that they
        find; None where there are none.

        Raises:
            CompressError: a file that does not exist.
        """
        options = self.config.get("dataset_kwargs")
        given = options.get("data_files") if isinstance(options, dict) else None
        return None if given is None else self._absolute(given)

    def _absolute(self, given: Any) -> Any:
        if isinstance(given, dict):
            return {split: self._absolute(value) for split, value in given.items()}
        if isinstance(given, list):
            return [path for value in given for path in _leaves(self._absolute(value))]
        if "://" in str(given):
            return given
        folder, asked = self.path.parent, Path(str(given)).expanduser()
        pattern = any(mark in str(given) for mark in "*?[")
        names = glob.glob(str(asked), root_dir=folder, recursive=True) if pattern else [asked]
        found = sorted(str(folder / name) for name in names if (folder / name).is_file())
        if not found:
            raise CompressError(
                f"the data of the task {self.name!r} at {given}, from the folder of {self.path}",
                f"no such file ({folder / asked})", "Correct data_files in that YAML file",
            )  # fmt: skip
        return found if pattern else found[0]

    def digests(self) -> dict[str, str]:
        """sha256 of its files and of its data, by their paths from its folder."""
        found = [*self.sources, *map(Path, _leaves(self.data_files()))]
        return {self._path_from_here(path): file_sha256(path) for path in found if path.is_file()}

    def _path_from_here(self, path: Path) -> str:
        return Path(os.path.relpath(path, self.path.parent)).as_posix()


@dataclass(frozen=True)
class UserTasks:
    """The tasks that an evaluation can name.

    Attributes:
        named: what each entry that is a file stands for, by the entry.
        found: every task and group by its name.
        folders: that lm-eval is to search.
    """

    named: Mapping[str, UserTask] = field(default_factory=dict)
    found: Mapping[str, UserTask] = field(default_factory=dict)
    folders: tuple[Path, ...] = ()

    @property
    def names(self) -> frozenset[str]:
        """Names of tasks, groups and tags."""
        tags = {tag for task in self.found.values() for tag in task.tags}
        return frozenset({*self.found, *tags})

    def resolved(self, tasks: Sequence[str]) -> tuple[str, ...]:
        """Names in the place of files."""
        return tuple(self.named[task].name if task in self.named else task for task in tasks)

    @contextmanager
    def searched(self) -> Iterator[tuple[Path, ...]]:
        """Folders for lm-eval in which all data have absolute paths, inside the block."""
        with tempfile.TemporaryDirectory(prefix="compress-tasks-") as made:
            for index, task in enumerate(self.found.values()):
                told: dict[str, Any] = {"include": str(task.path)}
                data = task.data_files()
                if data is not None:
                    told["dataset_kwargs"] = {**task.config["dataset_kwargs"], "data_files": data}
                (Path(made) / f"{index}.yaml").write_text(yaml.safe_dump(told))
            yield (*self.folders, Path(made))


def is_task_file(task: str) -> bool:
    """Whether an entry of ``tasks`` is a file's path, not a task's name."""
    return task.endswith(_SUFFIXES)


def user_tasks(tasks: Sequence[str], include_path: Sequence[str | Path]) -> UserTasks:
    """Read the YAML files that ``tasks`` names and those in the folders ``include_path``.

    Raises:
        CompressError: no such file or folder, YAML that does not parse, a file without a task.
    """
    folders = tuple(_folder(place) for place in include_path)
    found: dict[str, UserTask] = {}
    for folder in folders:
        for path in sorted(p for p in folder.rglob("*") if p.suffix in _SUFFIXES):
            task = read_task(path)
            if task.name is not None:
                found[task.name] = task
    named = {}
    for entry in filter(is_task_file, tasks):
        task = read_task(user_path(entry, "a YAML file with a task"))
        if task.name is None:
            raise CompressError(
                "a YAML file with `task: NAME` (lm-eval's documentation: New Task Guide)",
                f"{entry} without", "Add the key",
            )  # fmt: skip
        named[entry] = found[task.name] = task
    return UserTasks(named, found, folders)


def read_task(path: Path) -> UserTask:
    """Read one file and those that it includes.

    Raises:
        CompressError: there is none, or it is no YAML mapping.
    """
    config, sources = _read(path.resolve(), ())
    return UserTask(path.resolve(), config, sources)


def _read(path: Path, within: tuple[Path, ...]) -> tuple[dict[str, Any], tuple[Path, ...]]:
    if path in within:
        raise CompressError("task files that do not include each other in a circle", str(path))
    try:
        own = yaml.load(path.read_text(encoding="utf-8"), _Plain)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        told = " ".join(str(error).split())[:300]
        raise CompressError("a YAML file with an lm-eval task", f"{path}: {told}") from None
    if not isinstance(own, dict):
        raise CompressError("a YAML mapping with an lm-eval task", f"{path}, which is none")
    included = own.pop("include", ())
    merged: dict[str, Any] = {}
    sources = (path,)
    for name in [included] if isinstance(included, str) else included:
        theirs, more = _read((path.parent / name).resolve(), (*within, path))
        merged |= theirs
        sources += more
    return merged | own, sources


def _folder(place: str | Path) -> Path:
    folder = user_path(place, "a folder with lm-eval tasks")
    if not folder.is_dir():
        raise CompressError(
            "an existing folder with lm-eval tasks (include_path)", repr(str(place))
        )
    return folder.resolve()


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _leaves(each)
    elif value is not None:
        yield str(value)
