"""Standard output that cannot be written: no room behind it, or nobody who reads.

A table that cannot be printed is another thing than a file that cannot be written: by then what the
command was asked to do is done. So failures of standard output have a type of their own.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

FAILED = 1  # as the coreutils end where their output is lost
READER_GONE = 128 + 13  # what a shell shows for a command that SIGPIPE has ended


class OutputLost(Exception):
    """Standard output could not be written.

    No ``OSError``: the libraries for command lines and tables answer those themselves.

    Args:
        error: what the operating system said.

    Attributes:
        done: what the command has done nevertheless, as a clause; "" where it was to print only.
    """

    def __init__(self, error: OSError) -> None:
        super().__init__(error)
        self.error = error
        self.done = ""

    @property
    def silent(self) -> bool:
        """Whether the reader has left, as in ``| head``, which is no failure to be told."""
        return self.error.errno == errno.EPIPE

    @property
    def status(self) -> int:
        return READER_GONE if self.silent else FAILED

    def __str__(self) -> str:
        told = f"standard output could not be written ({self.error.strerror or self.error})"
        return f"{told}; {self.done}" if self.done else told


@contextmanager
def telling(done: str) -> Iterator[None]:
    """Print inside the block what comes of work that ``done`` says is finished."""
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except OutputLost as lost:
        lost.done = done
        raise


class guarded_stdout(AbstractContextManager):
    """Raises :class:`OutputLost` where standard output fails inside the block, or at its end.

    An error that ends the block is not replaced by one of the output.
    """

    def __enter__(self) -> None:
        self._stream = sys.stdout
        if self._stream is not None:  # closed before the process began: nobody wants to be told
            sys.stdout = _Guarded(self._stream)

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        guarded, sys.stdout = sys.stdout, self._stream
        if self._stream is None:
            return
        try:
            guarded.flush()
        except OutputLost:
            _discard(self._stream)
            if error is None or (isinstance(error, SystemExit) and not error.code):
                raise


class _Guarded:
    """A text stream whose failures are :class:`OutputLost`."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            raise OutputLost(error) from error

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            raise OutputLost(error) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _discard(stream: Any) -> None:
    """Send what a stream still holds nowhere: the interpreter writes it once more when it ends."""
    with suppress(OSError, ValueError):  # a stream of the caller's that is no file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def size(count: float) -> str:
    """Bytes with a unit."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
