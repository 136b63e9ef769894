"""How the command line says that something went wrong: one paragraph, and an exit status.

Two kinds are kept apart. What the user can mend has a message of its own wherever it is found, and
ends with status 2. Everything else is a defect of the toolkit, is called one, and ends with 70.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from contextlib import suppress
from pathlib import Path

from compress.errors import CompressError
from compress.system.intake import printable

USER, DEFECT = 2, 70  # 70 is EX_SOFTWARE of sysexits.h

# What a file system refuses is a fact about the machine, whatever code met it.
_MACHINE = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOENT,
    errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EMFILE, errno.ENFILE,
    errno.EIO, errno.ENXIO, errno.EFBIG,
}  # fmt: skip


def report(error: Exception) -> int:
    """Print one paragraph about ``error`` on stderr and return the exit status."""
    told = error if isinstance(error, CompressError) else _of_the_machine(error)
    if told is not None:
        tell(f"error: {printable(str(told))}")
        return USER
    tell(f"error: {printable(_defect(error))}")
    return DEFECT


def tell(line: str) -> None:
    """Print a last word on stderr; where that cannot be written the exit status says it alone."""
    with suppress(OSError, ValueError):  # ValueError: it was closed
        if sys.stderr is not None:
            print(line, file=sys.stderr, flush=True)


def _of_the_machine(error: Exception) -> CompressError | None:
    if isinstance(error, MemoryError):
        return CompressError(
            "enough memory for this step", str(error) or "none left",
            "Lower calibration.length or calibration.batch, or state a limit (--max-memory), so "
            "that the plan can refuse in time",
        )  # fmt: skip
    error = _of_the_system(error)
    if isinstance(error, OSError) and error.errno in _MACHINE:
        named = f" {str(error.filename)!r}" if error.filename is not None else ""
        return CompressError(
            f"to use the file or folder{named}", error.strerror or str(error),
            "Check the path, its permissions and the room on its disk; a run that is given again "
            "goes on from its last finished block",
        )  # fmt: skip
    return None


def _of_the_system(error: Exception) -> Exception:
    """What safetensors wraps, as the error of the operating system that it is."""
    from safetensors import SafetensorError

    found = re.search(r"\(os error (\d+)\)", str(error))
    if found is None or not isinstance(error, SafetensorError):
        return error
    return OSError(int(found[1]), os.strerror(int(found[1])))


def _defect(error: Exception) -> str:
    """Name the innermost place of the toolkit that the error passed through."""
    frames = traceback.extract_tb(error.__traceback__)
    package = Path(__file__).parents[1]
    places = (str(package), str(package.parent / "eval"))  # in a checkout, eval lies beside
    own = [frame for frame in frames if frame.filename.startswith(places)]
    place = (own or frames)[-1] if frames else None
    where = f" at {Path(place.filename).name}:{place.lineno} in {place.name}" if place else ""
    what = " ".join(str(error).split())[:300]
    return (
        f"this is a defect of compress, not of what you gave it: {type(error).__name__}{where}"
        + (f" ({what})" if what else "")
        + ". Nothing that was finished is lost. Run `compress --traceback` with the same command "
        "for the details, and report them"
    ) + "."
