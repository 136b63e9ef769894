"""Quality figures that were measured before, by everything that decides them.

A figure is taken from here only where measuring again would compute the same: the same checkpoint
(weights, config and what lies beside them), the same tokens, the same protocol, type and device,
the same code of ours and of what a recipe imports, and the same versions of the libraries. Times
and memory are never kept: they are of a machine at a moment. Nor is a model that has no folder:
hooks, patched modules and wrappers decide what a live model computes, and nothing short of running
it tells all of them.

An entry is one JSON file of a few kB with a digest of itself. One that is damaged, or says of
itself anything else than what is asked for, is no entry: the figure is measured and replaces it.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import warnings
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from compress.errors import CompressError
from compress.models.sources.cache import default_cache, locked
from compress.system.files import write_atomically
from compress.system.intake import parse_json, read_limited
from compress.system.machine import versions
from compress.system.version import VERSION

Result = TypeVar("Result", bound=BaseModel)

LARGEST_ENTRY = 2**20  # bytes; more than the windows of a text of 10 M tokens take
MOST_ENTRIES, MOST_BYTES = 1000, 32 * 2**20  # beyond these the ones that were used last stay
_FOLDER = "evaluations"
_LAYOUT = 2  # of an entry; part of its key

# What decides no figure: how models are changed, planned, trained and reported, and who calls. All
# else, also what is yet to be written, does. (``eval`` may lie inside the package or beside it.)
_NO_PART = (
    "api.py",
    "cli",
    "conformance",
    "engine",
    "eval",
    "methods",
    "planning",
    "recipes",
    "train",
)
_NO_PART_OF_EVAL = ("bench", "report", "results")


class Recalled(NamedTuple):
    """A figure from the cache.

    Attributes:
        result: as it was measured, bit for bit.
        measured: when, ISO 8601 in UTC.
        seconds: what measuring took.
    """

    result: Any
    measured: str
    seconds: float


class Figures:
    """The quality figures of one checkpoint.

    Args:
        checkpoint: its digest (:func:`compress.models.identity.model_digest`).
        cache_dir: the toolkit's cache folder, in which entries have a folder of their own; the
            default is that of :func:`compress.models.sources.cache.default_cache`.
        imported: digests of code that was imported beside the package's, which may hold the model's
            class or change what others compute.
    """

    def __init__(
        self,
        checkpoint: str,
        cache_dir: str | Path | None = None,
        imported: Iterable[str] = (),
    ) -> None:
        self.checkpoint = checkpoint
        self.imported = sorted(imported)
        self.cache = default_cache() if cache_dir is None else Path(cache_dir).expanduser()
        self.folder = self.cache / _FOLDER

    def recall(self, part: str, protocol: dict[str, Any], kind: type[Result]) -> Recalled | None:
        """What was measured of ``part`` by the same protocol; None where nothing was.

        Args:
            part: of an evaluation: perplexity, masked, generator, tasks.
            protocol: plain data that decides the figure together with checkpoint and code.
            kind: of the result.
        """
        key = self._key(part, protocol)
        path = self._path(key)
        try:
            entry = parse_json(read_limited(path, "a cached figure", LARGEST_ENTRY))
            kept = {k: entry[k] for k in ("key", "measured", "seconds", "result")}
            if entry["sha256"] != _digest(kept) or kept["key"] != key:
                return None
            datetime.fromisoformat(kept["measured"])
            found = kind.model_validate(kept["result"])
        except (CompressError, ValidationError, ValueError, KeyError, TypeError):
            return None
        with suppress(OSError):
            os.utime(path)  # what is used stays longest
        return Recalled(found, kept["measured"], float(kept["seconds"]))

    def keep(self, part: str, protocol: dict[str, Any], result: BaseModel, seconds: float) -> None:
        """Store what was measured; a folder that cannot be written costs a warning.

        What JSON does not carry to the bit (NaN, infinity) and what is larger than an entry may be
        is not stored.
        """
        plain = json.loads(result.model_dump_json())
        with suppress(ValidationError):
            if type(result).model_validate(plain) == result:
                self._write(self._key(part, protocol), plain, seconds)

    def _write(self, key: dict[str, Any], result: Any, seconds: float) -> None:
        measured = datetime.now(UTC).isoformat(timespec="seconds")
        kept = {"key": key, "measured": measured, "seconds": seconds, "result": result}
        text = json.dumps({"sha256": _digest(kept), **kept}) + "\n"
        if len(text) > LARGEST_ENTRY:
            return
        try:
            with locked(self.cache, _FOLDER):  # two runs may measure the same at once
                self.folder.mkdir(parents=True, exist_ok=True)
                write_atomically(self._path(key), text)
                _prune(self.folder)
        except (CompressError, OSError) as error:
            warnings.warn(f"evaluation figures are not cached: {error}", stacklevel=2)

    def _key(self, part: str, protocol: dict[str, Any]) -> dict[str, Any]:
        key = {
            "layout": _LAYOUT, "part": part, "checkpoint": self.checkpoint, "protocol": protocol,
            "code": code_digest(), "imported": self.imported, "versions": versions(),
        }  # fmt: skip
        return json.loads(json.dumps(key))  # tuples are lists in an entry

    def _path(self, key: dict[str, Any]) -> Path:
        return self.folder / f"{_digest(key)}.json"


@functools.cache
def code_digest() -> str:
    """sha256, as hex, of the package's version and of all code that decides a quality figure."""
    package, own = Path(inspect.getfile(CompressError)).parent, Path(__file__).parent
    found = hashlib.sha256()
    found.update(VERSION.encode())
    for root, left_out in ((package, _NO_PART), (own, _NO_PART_OF_EVAL)):
        for path in sorted(root.rglob("*")):
            name = path.relative_to(root)
            if path.suffix in (".py", ".yaml") and name.parts[0] not in left_out:
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                found.update(f"{root.name}/{name.as_posix()}\0{content}\n".encode())
    return found.hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _prune(folder: Path) -> None:
    """Remove the entries that were used longest ago, where there are too many."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            stat = entry.stat(follow_symlinks=False)
            found.append((stat.st_mtime_ns, stat.st_size, entry.path))
    room = MOST_BYTES
    for rank, (_, size, path) in enumerate(sorted(found, reverse=True), start=1):
        room -= size
        if rank > MOST_ENTRIES or room < 0:
            with suppress(OSError):
                os.unlink(path)
