"""Files and folders that a reader sees whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compress.errors import CompressError


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that readers see the old one or the new one.

    Raises:
        CompressError: the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(path.name + ".partial")
    try:
        with open(temporary, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise disk_error(path.parent, error) from error


def disk_error(folder: Path, error: OSError) -> CompressError:
    """Say what a failed write means."""
    usage = os.statvfs(folder)
    return CompressError(
        f"to write in {folder}",
        f"{error.strerror or error} ({usage.f_bavail * usage.f_frsize / 1e9:.1f} GB free)",
        "Make room and run the same command again: it goes on from the last finished block",
    )


@contextmanager
def whole_folder(folder: Path, holds: str, advice: str) -> Iterator[Path]:
    """A folder under a temporary name, which takes the name ``folder`` when the block ends well.

    What ``folder`` held before is replaced; when the block raises, it stays and nothing else does.
    A folder that an interrupted process left behind under the temporary name is removed.

    Args:
        holds: what is written, for the error.
        advice: what to do when the disk is full or cannot be written.

    Raises:
        CompressError: in the place of an ``OSError``.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    except OSError as error:
        raise CompressError(
            f"to write {holds} to {folder}", error.strerror or str(error), advice
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
