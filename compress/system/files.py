"""Files and folders that a reader sees whole or not at all, and that outlive a power cut."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from compress.errors import CompressError

_NOTHING_LEFT = "Make room or choose another place; nothing was left behind"


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that readers see the old one or the new one.

    Raises:
        CompressError: the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(path.name + ".partial")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise disk_error(path.parent, error) from error


def refuse_existing(*paths: Path, replaceable: bool = True) -> None:
    """Refuse to write where something is: it may be somebody's work.

    Args:
        replaceable: whether the command has an option that replaces it.

    Raises:
        CompressError: naming the first of ``paths`` that exists, be it a link to nothing.
    """
    for path in paths:
        if path.exists() or path.is_symlink():
            raise CompressError(
                f"{path} not to exist yet", "a file of that name",
                "Choose another place with --out (in Python: out)"
                + (", or replace it by --overwrite (overwrite=True)" if replaceable else ""),
            )  # fmt: skip


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, outlive a power cut.

    A renamed file is durable when both its content and the folder that names it are.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def content_digest(path: Path) -> str:
    """blake2b (128 bits) of a file's content, hex: a gigabyte a second on any processor."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def files_below(folder: Path) -> list[Path]:
    """All files below a folder in the order of their names; links to folders are not followed."""
    return sorted(p for p in folder.rglob("*") if p.is_file())


def disk_error(folder: Path, error: OSError) -> CompressError:
    """Say what a failed write means."""
    return CompressError(
        f"to write in {folder}",
        f"{error.strerror or error}{_free(folder)}",
        "Make room and run the same command again: what is finished is not done again",
    )


def _free(folder: Path) -> str:
    """Room in a folder, in brackets."""
    with suppress(OSError):  # the folder itself may be what is gone
        usage = os.statvfs(folder)
        return f" ({usage.f_bavail * usage.f_frsize / 1e9:.1f} GB free)"
    return ""


@contextmanager
def whole_folder(folder: Path, holds: str, advice: str) -> Iterator[Path]:
    """A folder of ours under a temporary name, which takes its name when the block ends well.

    For folders inside a run's folder: what ``folder`` held is replaced then, and what an
    interrupted process left under the temporary name is removed. When the block raises, what
    ``folder`` held stays and nothing else does.

    Args:
        holds: what is written, for the error.
        advice: what to do when the disk is full or cannot be written.

    Raises:
        CompressError: in the place of an ``OSError``.
    """
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        _sync_all(partial)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
        sync(folder.parent)
    except OSError as error:
        raise _unwritten(folder, holds, advice, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def new_file(path: Path, holds: str) -> Iterator[Path]:
    """A file of the user's choice under a temporary name beside its own, which it takes when the
    block ends well; otherwise nothing is left.

    Args:
        holds: what is written, for the error.

    Raises:
        CompressError: in the place of an ``OSError``.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        partial = Path(name)
        try:
            yield partial
            partial.chmod(0o644)
            sync(partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritten(path, holds, _NOTHING_LEFT, error) from error


@contextmanager
def new_folder(folder: Path, holds: str) -> Iterator[Path]:
    """As :func:`whole_folder` for a folder of the user's choice: nothing there is replaced.

    The temporary name is one that nobody else has.

    Raises:
        CompressError: in the place of an ``OSError``; ``folder`` is there and not empty in the end.
    """
    folder = folder.absolute()
    try:
        with scratch_folder(folder.parent, f".{folder.name}.") as scratch:
            partial = scratch / folder.name  # of ordinary permissions, unlike its parent
            partial.mkdir()
            yield partial
            _sync_all(partial)
            if _is_here(folder):
                _fill(folder, partial)  # whose shell would be left in a folder that is gone
                return
            if folder.exists():
                folder.rmdir()
            os.replace(partial, folder)
            sync(folder.parent)
    except OSError as error:
        raise _unwritten(folder, holds, _NOTHING_LEFT, error) from error


def _is_here(folder: Path) -> bool:
    """Whether a folder is the one that this process works in."""
    try:
        return folder.samefile(os.curdir)
    except FileNotFoundError:
        return False


def _fill(folder: Path, partial: Path) -> None:
    """Move what is in one folder to an empty one; last the file without which nobody opens it."""
    if any(folder.iterdir()):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(folder))
    for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, folder / path.name)
    sync(folder)


def _sync_all(folder: Path) -> None:
    for path in files_below(folder):
        sync(path)
    sync(folder)


def _unwritten(place: Path, holds: str, advice: str, error: OSError) -> CompressError:
    found = f"{error.strerror or error}{_free(place.parent)}"
    return CompressError(f"to write {holds} to {place}", found, advice)


@contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder in ``parent`` that goes with the block.

    Folders of the same prefix whose process was killed are removed first: a living one holds a lock
    on its folder.
    """
    parent.mkdir(parents=True, exist_ok=True)
    _sweep(parent, prefix)
    folder, descriptor = _held_folder(parent, prefix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


_SUFFIX = ".compress-tmp"


def _held_folder(parent: Path, prefix: str) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=_SUFFIX, dir=parent))
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if folder.exists():
            return folder, descriptor
        os.close(descriptor)  # somebody swept it away before it was held


def _sweep(parent: Path, prefix: str) -> None:
    """Remove scratch folders that no living process holds."""
    # Not a pattern: a folder's name may hold characters that mean something in one.
    for name in os.listdir(parent):
        if not (name.startswith(prefix) and name.endswith(_SUFFIX)):
            continue
        with suppress(OSError):
            descriptor = os.open(parent / name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(parent / name, ignore_errors=True)
            finally:
                os.close(descriptor)
