"""Progress: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from compress.system.intake import printable


class Progress(AbstractContextManager):
    """Tells on stderr how far a run is.

    Where stderr is closed, on a full disk or a pipe that nobody reads, it says nothing more: work
    does not end because nobody can be told of it.

    Args:
        quiet: say nothing.
        interval: seconds between two plain lines where there is no terminal.
    """

    def __init__(self, quiet: bool = False, interval: float = 15.0) -> None:
        self.quiet, self.interval = quiet, interval
        self._last = 0.0
        self._started: dict[str, tuple[float, int, int]] = {}  # first time and count, last count
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}
        if sys.stderr is None or sys.stderr.closed:
            self.quiet = True
        elif not quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()

    def __exit__(self, *_exc: object) -> None:
        if self._bar is not None:
            with self._giving_up():
                self._bar.stop()

    def say(self, text: str) -> None:
        """One line."""
        if self.quiet:
            return
        text = printable(text)
        if self._bar is not None:
            with self._giving_up():
                self._bar.console.print(text, markup=False, highlight=False)
        else:
            self._print(text)

    def update(self, name: str, done: int, total: int, note: str = "") -> None:
        """``done`` of ``total`` units of the task ``name`` are finished; ``note`` tells more."""
        if self.quiet:
            return
        note = printable(note)
        if self._bar is not None:
            from rich.markup import escape

            described = escape(f"{name}, {note}" if note else name)
            with self._giving_up():
                if name not in self._tasks:
                    self._tasks[name] = self._bar.add_task(name, total=total)
                self._bar.update(
                    self._tasks[name], completed=done, total=total, description=described
                )
            return
        now = time.monotonic()
        if done <= self._started.get(name, (now, 0, done))[2]:
            self._started.pop(name, None)  # the same task once more: its clock starts anew
        start, first, _ = self._started.get(name, (now, done, done))
        self._started[name] = (start, first, done)
        if done >= total or now - self._last >= self.interval:
            self._last = now
            left = ""
            if done < total and done > first and now > start:
                left = f", about {(now - start) / (done - first) * (total - done):.0f} s left"
            told = f", {note}" if note else ""
            self._print(f"{name}: {done}/{total}{told}{left}")

    def _print(self, line: str) -> None:
        with self._giving_up():
            print(line, file=sys.stderr, flush=True)

    @contextmanager
    def _giving_up(self) -> Iterator[None]:
        """Say nothing more once stderr fails."""
        try:
            yield
        except (OSError, ValueError):  # no room, no reader, no terminal; closed by whoever calls us
            self.quiet = True
