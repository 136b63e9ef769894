"""What a run said, kept in its folder: a line each, with the time, whatever the terminal showed."""

from __future__ import annotations

import traceback
from datetime import UTC, datetime
from pathlib import Path

from compress.system.intake import printable

_MOST_HELD = 1000  # lines before the file is begun


class RunLog:
    """A text file that grows by lines; each starts anew where an earlier process ended.

    Lines are held back until :meth:`begin`, so that a run which is refused leaves no file. A log is
    no reason to end a run: where it cannot be written, nothing more is.

    Args:
        path: of the file; its folder exists when :meth:`begin` is called.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held: list[str] | None = []

    def begin(self) -> None:
        """Write what was said so far, and from now on at once."""
        if self._held is not None:
            lines, self._held = self._held, None
            self._append("".join(lines))

    def write(self, text: str) -> None:
        """Add a line; a text of several lines has the time in front of its first."""
        line = f"{datetime.now(UTC).isoformat(timespec='seconds')}  {text.rstrip()}\n"
        if self._held is None:
            self._append(line)
        elif len(self._held) < _MOST_HELD:
            self._held.append(line)

    def failed(self, error: BaseException) -> None:
        """Add an error with where in the code it came from."""
        trace = "".join(traceback.format_exception(error))
        self.write(f"ended by {type(error).__name__}: {printable(str(error))}\n{trace}")

    def _append(self, text: str) -> None:
        try:
            with self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        except OSError:
            self._held = []  # held for ever: no room, or a folder that is gone
