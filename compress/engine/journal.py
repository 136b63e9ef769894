"""The journal of a run: what is done, a line an event, each line vouched for by the next.

Every line ends in ``check``, a digest of its content and of the line before it. A line that was
changed, lost, doubled or moved is noticed, and so is one that a power cut replaced by zeros: the
journal counts up to there, and what followed is done again. Lines that earlier versions wrote have
no ``check``; they are taken as they are, and vouched for by the first line that has one.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from compress.system.files import disk_error, sync, write_atomically

REWIND, DAMAGED = "rewind", "damaged"
_CHECK = ', "check": "'  # what comes between the content of a line and its digest


class Journal:
    """The events of a run, in a file that only grows.

    Attributes:
        events: those that count, oldest first; a rewind takes back what it names.
        notes: why something is done again, as sentences, oldest first.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.events: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self._last = ""  # digest of all lines so far

    def open(self, mend: bool) -> None:
        """Read the file.

        Args:
            mend: cut off what is damaged, durably; only for the process that holds the folder.
        """
        self.events, self.notes, self._last = [], [], ""
        data = self.path.read_bytes() if self.path.exists() else b""
        whole, newline, torn = data.rpartition(b"\n")
        good, lines, wrong = 0, (whole + newline).splitlines(keepends=True), 0
        for number, line in enumerate(lines, 1):
            if line.strip() and not self._take(line):
                wrong = number
                break
            good += len(line)
        if mend and good < len(data):
            # A crash in the middle of a write leaves half a line: it was never acknowledged.
            write_atomically(self.path, data[:good].decode())
            if wrong:
                count = len(lines) - wrong + 1
                self.append({"event": DAMAGED, "why": f"line {wrong} of {self.path.name} is not "
                             f"what was written ({count} lines are left out)"})  # fmt: skip

    def append(self, event: dict[str, Any]) -> None:
        """Add an event and make it durable.

        Raises:
            CompressError: the disk is full or the folder is gone.
        """
        text = json.dumps(event, sort_keys=True)
        check = _digest(self._last, text)
        line = f'{text[:-1]}{_CHECK}{check}"}}\n'
        new = not self.path.exists()
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            if new:
                sync(self.path.parent)
        except OSError as error:
            raise disk_error(self.path.parent, error) from error
        self._last = check
        self._count(event)

    def rewind(self, keep: int, why: str) -> None:
        """Take back all events but the first ``keep``: what they tell of is to be done again."""
        self.append({"event": REWIND, "keep": keep, "why": why})

    def _take(self, line: bytes) -> bool:
        """Count one line if it is what was written."""
        try:
            event = json.loads(line)
        except ValueError:  # of JSON or of UTF-8
            return False
        if not isinstance(event, dict) or "event" not in event:
            return False
        content, _, check = line.decode().rstrip("\n").rpartition(_CHECK)
        if event.pop("check", None) is not None:
            expected = _digest(self._last, content + "}")
            if check != expected + '"}':
                return False
            self._last = expected
        elif self._last.startswith("+"):
            return False
        else:
            self._last = "-" + _digest(self._last, line.decode().rstrip("\n"))
        self._count(event)
        return True

    def _count(self, event: dict[str, Any]) -> None:
        if event["event"] == REWIND:
            del self.events[event["keep"] :]
        if event["event"] in (REWIND, DAMAGED):
            self.notes.append(event["why"])
        else:
            self.events.append(event)


def _digest(before: str, text: str) -> str:
    """Of a line and all before it; marked so that old lines cannot follow new ones."""
    return "+" + hashlib.blake2b(f"{before}\n{text}".encode(), digest_size=12).hexdigest()
