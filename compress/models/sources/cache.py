"""The cache: folders that are either whole or absent, whoever is killed while making them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from compress.errors import CompressError
from compress.system.files import files_below, write_atomically
from compress.system.tensors import TensorIndex, file_sha256

RECORD = "compress_source.json"  # in each cached folder: where it came from
LOCK_TIMEOUT = 1800.0  # seconds to wait for another process that fetches the same thing


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/compress``, or ``~/.cache/compress``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "compress"


def locked(cache: Path, name: str):
    """A lock between processes for one thing in the cache, as a context manager."""
    from filelock import FileLock

    folder = cache / "locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CompressError(
            f"a cache folder that can be written ({cache})", str(error), "Give another cache folder"
        ) from error
    return FileLock(folder / f"{name}.lock", timeout=LOCK_TIMEOUT)


def cached_folder(folder: Path, build: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Make ``folder`` with ``build`` unless it is there and sound; return its record.

    ``build`` fills an empty folder and returns the record to keep with it. It works under a
    temporary name beside the target, which is renamed at the end, so a killed process leaves no
    half-made folder under the final name. The caller holds the lock.
    """
    if folder.exists():
        record = _sound(folder)
        if record is not None:
            return record
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{folder.name}.*"):  # of a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        record = build(temporary)
        record = {**record, "files": _digests(temporary)}
        (temporary / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        temporary.chmod(0o755)  # mkdtemp makes folders for one user only
        os.replace(temporary, folder)
    except (OSError, SafetensorError) as error:  # the latter when a tensor file does not fit
        raise CompressError(
            f"room and permission to write {folder}", str(error),
            "Make room, or give another cache folder",
        ) from error  # fmt: skip
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return record


def _sound(folder: Path) -> dict[str, Any] | None:
    """The record of a cached folder; None where the folder is not what was made.

    Every file is hashed: a disk that fails changes neither sizes nor times. A folder of an earlier
    version, whose record has no digests, gets them now.
    """
    try:
        TensorIndex.open(folder)
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        found = _digests(folder)
        if "files" not in record:
            record["files"] = found
            write_atomically(folder / RECORD, json.dumps(record, indent=2) + "\n")
        return record if record["files"] == found else None
    except (CompressError, OSError, ValueError, TypeError):
        return None


def _digests(folder: Path) -> dict[str, str]:
    """Name -> sha256 of every file of a cached folder but its record."""
    files = (p for p in files_below(folder) if p.name not in (RECORD, RECORD + ".partial"))
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}
