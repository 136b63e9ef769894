"""Runs that die: what a method's state has to survive."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from compress.engine.workspace import Workspace


class Killed(BaseException):
    """Ends a run at once: no error that anything handles."""


@contextmanager
def killed_at(number: int, written: bool) -> Iterator[None]:
    """Let runs meanwhile die at their ``number``-th journal event from now on.

    Args:
        number: counts from 1; a run with fewer events lives.
        written: the event is in the journal already when the run dies.
    """
    append, seen = Workspace.append, 0

    def dying(self: Workspace, event: dict[str, Any]) -> None:
        nonlocal seen
        seen += 1
        if seen == number and not written:
            raise Killed
        append(self, event)
        if seen == number:
            raise Killed

    Workspace.append = dying
    try:
        yield
    finally:
        Workspace.append = append
