"""Ctrl-C and its kin on the command line: one line that says what was kept, and an exit status."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_AGAIN = 0.02  # seconds until a signal that went unheard is sent once more


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

    Where Python drops exceptions (in finalisers and in callbacks of weak references, of which an
    import calls thousands) it is raised anew a moment later; of an error that a library makes of
    it, it takes the place. Signals that the process was told to ignore (``nohup``) stay ignored.
    Outside the main thread, where Python sets no handlers, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    heard: list[int] = []

    def stop(number: int, _frame: Any) -> None:
        heard.append(number)
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        raise Stopped(number)

    def dropped(unraisable: Any) -> None:
        stopped = unraisable.exc_value
        if not isinstance(stopped, Stopped):
            tell_dropped(unraisable)
            return
        listen()
        again = threading.Timer(_AGAIN, signal.raise_signal, (stopped.number,))
        again.daemon = True
        again.start()

    def listen() -> None:
        for number in before:
            signal.signal(number, stop)

    before = {n: signal.getsignal(n) for n in _SIGNALS}
    before = {n: handler for n, handler in before.items() if handler != signal.SIG_IGN}
    tell_dropped, sys.unraisablehook = sys.unraisablehook, dropped
    try:
        listen()
        yield
    except Exception as error:
        if heard:
            raise Stopped(heard[0]) from error
        raise
    finally:
        sys.unraisablehook = tell_dropped
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
