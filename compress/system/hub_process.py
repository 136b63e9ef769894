"""Ask a hub in a process of its own, which is ended when the hub falls silent.

The hub's libraries wait, try again and obey a hub that asks for an hour of patience, in threads
that nothing can stop.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SILENCE = 60.0  # seconds in which something has to arrive
_IMPORTS = 600.0  # seconds for what needs no hub


class HubError(Exception):
    """What a hub's library raised in the other process.

    Attributes:
        types: names of the error's class and its bases.
    """

    def __init__(self, types: list[str], text: str) -> None:
        super().__init__(text)
        self.types = tuple(types)


class Conversation:
    """A task of :mod:`compress.system.hub_worker` and its answers, one after the other."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._pipe = process.stdout.fileno()
        self._read = b""

    def answer(self, seconds: float) -> dict[str, Any]:
        """The next answer.

        Raises:
            TimeoutError: none came in so many seconds.
            HubError: what the library says, or the end of the process.
        """
        until = time.monotonic() + seconds
        while b"\n" not in self._read:
            if not self._readable(max(0.0, until - time.monotonic())):
                raise TimeoutError
            piece = os.read(self._pipe, 2**20)
            if not piece:
                raise HubError(["OSError"], "the process that asked ended without a word")
            self._read += piece
        line, _, self._read = self._read.partition(b"\n")
        found = json.loads(line)
        if "types" in found:
            raise HubError(found["types"], found["text"])
        return found

    def _readable(self, seconds: float) -> bool:
        # Not select.select: it fails in a process that has more than 1,024 files open.
        with selectors.DefaultSelector() as waiting:
            waiting.register(self._pipe, selectors.EVENT_READ)
            return bool(waiting.select(seconds))


@contextmanager
def asked(task: str, **options: Any) -> Iterator[Conversation]:
    """Start a task of :mod:`compress.system.hub_worker`; it is ended with the block.

    Args:
        options: of the task, as plain data.

    Raises:
        HubError, TimeoutError: as :meth:`Conversation.answer`.
    """
    with subprocess.Popen(
        [sys.executable, "-P", str(Path(__file__).with_name("hub_worker.py"))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        try:
            process.stdin.write(json.dumps({"task": task, **options}).encode() + b"\n")
            process.stdin.flush()  # it stays open: its end tells the worker that we are gone
            conversation = Conversation(process)
            conversation.answer(_IMPORTS)  # that it has started
            yield conversation
        finally:
            process.kill()
