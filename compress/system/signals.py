"""Ctrl-C and its kin on the command line: one line that says what was kept, and an exit status."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A signal that asks the process to end.

    No ``Exception``, which libraries catch, and no ``KeyboardInterrupt``, of which the command line
    library makes an exit status of its own.

    Attributes:
        number: of the signal. kept: what is kept of the work and how to go on, as a sentence.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        self.kept = "the same command starts again"

    @property
    def status(self) -> int:
        """The exit status by the shells' convention: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.number

    def __str__(self) -> str:
        name = "interrupted" if self.number == signal.SIGINT else signal.Signals(self.number).name
        return f"{name}: {self.kept}"


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise :class:`Stopped` where a signal arrives; a second one ends the process at once.

    Signals that the process was told to ignore (``nohup``) stay ignored. Outside the main thread,
    where Python sets no handlers, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _frame: Any) -> None:
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        raise Stopped(number)

    before = {n: signal.getsignal(n) for n in _SIGNALS}
    before = {n: handler for n, handler in before.items() if handler != signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, stop)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
