"""What comes from outside, before anything is done with it: files, JSON, names to be shown.

Opening a FIFO waits for ever, reading a device never ends, and a few bytes can ask a parser for
more depth than the interpreter has. So a path is looked at before it is opened, and what is read
has a limit.
"""

from __future__ import annotations

import json
import os
import stat
import unicodedata
from contextlib import suppress
from pathlib import Path
from typing import Any

from compress.errors import CompressError

_KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip


def regular_file(path: str | os.PathLike[str], expected: str, fix: str = "Check the path") -> Path:
    """Return ``path`` when it is a regular file or a link to one; nothing is opened.

    Args:
        expected: what the file should be, for the error ("a recipe file").

    Raises:
        CompressError: there is no such file, or it is a folder, FIFO, socket or device.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a zero byte, or no file system's text
        why = getattr(error, "strerror", None) or str(error)
        raise CompressError(expected, f"{str(path)!r} ({why})", fix) from None
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "no regular file")
        raise CompressError(expected, f"{str(path)!r}, which is {kind}", fix)
    return path


def user_path(text: str | os.PathLike[str], expected: str) -> Path:
    """The path that a text names, with ``~`` filled in; there may be nothing.

    Raises:
        CompressError: no path can be so written: a zero byte, a name too long, no such home.
    """
    try:
        path = Path(text).expanduser()
        str(path).encode("utf-8")  # some libraries take no other paths
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            path.lstat()
    except (OSError, ValueError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        shown = str(text) if len(str(text)) < 100 else str(text)[:80] + " ..."
        raise CompressError(expected, f"{shown!r} ({why})", "Check the path") from None
    return path


def at_home(path: str | os.PathLike[str]) -> Path:
    """A path with ``~`` filled in; one that names nobody's home stays as it is."""
    return Path(os.path.expanduser(path))


def special_files(folder: Path) -> list[str]:
    """Names in a folder, at its top, that are neither files nor folders (or links to such)."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                mode = entry.stat().st_mode
            except OSError:
                continue  # a link to nothing, which whoever needs it will miss
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                found.append(entry.name)
    return sorted(found)


def read_limited(path: Path, expected: str, largest: int) -> bytes:
    """The bytes of a regular file of at most ``largest`` bytes.

    Raises:
        CompressError: as :func:`regular_file`; also a larger file, or one that cannot be read.
    """
    regular_file(path, expected)
    try:
        with path.open("rb") as file:
            data = file.read(largest + 1)
    except OSError as error:
        raise CompressError(expected, f"{path}: {error.strerror or error}") from None
    if len(data) > largest:
        raise CompressError(
            f"{expected} of at most {largest:,} bytes", f"more than that in {path}",
            "Check that this is the right file",
        )  # fmt: skip
    return data


def parse_json(text: str | bytes) -> Any:
    """``json.loads`` whose every refusal is a ValueError, depth beyond the interpreter's too."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("brackets nested too deeply") from None


def read_json(path: Path, expected: str, fix: str, *, largest: int = 64 * 2**20) -> Any:
    """Parse a JSON file.

    Args:
        expected: what the file should hold ("JSON in config.json"), for the error.
        fix: what to do where it does not.

    Raises:
        CompressError: as :func:`read_limited`; also what does not parse.
    """
    data = read_limited(path, expected, largest)
    try:
        return parse_json(data.decode("utf-8"))
    except ValueError as error:
        raise CompressError(expected, str(error), fix) from error


def reason(error: BaseException, longest: int = 300) -> str:
    """The type and the text of a library's error on one line, cut where it goes on and on."""
    text = " ".join(str(error).split())
    if len(text) > longest:
        text = text[:longest].rsplit(" ", 1)[0] + " ..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def printable(text: str) -> str:
    """``text`` with everything escaped that a terminal obeys instead of showing it.

    Names come out of files that anybody may have written: escape sequences could clear the screen
    or retitle the window, marks of direction could show another name than the real one. Line ends
    and tabs stay.
    """
    if text.isprintable():
        return text
    return "".join(c if c in "\n\t" or not _obeyed(c) else _escape(c) for c in text)


def _obeyed(character: str) -> bool:
    # Cc: control characters, Cf: invisible ones such as marks of direction, Cs: half a character.
    if character in "\u200c\u200d":  # joiners that scripts and emoji are written with
        return False
    return unicodedata.category(character) in ("Cc", "Cf", "Cs") or character in "\u2028\u2029"


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
