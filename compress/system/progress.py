"""Progress: a bar on a terminal and in a notebook, plain lines elsewhere, and a log of all."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from compress.system.intake import printable
from compress.system.memory import resident
from compress.system.run_log import RunLog


class Progress(AbstractContextManager):
    """Tells on stderr how far a run is.

    Where stderr is closed, on a full disk or a pipe that nobody reads, it says nothing more: work
    does not end because nobody can be told of it.

    Args:
        quiet: say nothing.
        interval: seconds between two plain lines where there is no terminal.
        verbose: a line for every unit of work, with the memory that the process has, and no bar.

    Attributes:
        log: where everything is written down too, also when quiet; see :meth:`logged`.
    """

    def __init__(
        self, quiet: bool = False, interval: float = 15.0, *, verbose: bool = False
    ) -> None:
        self.quiet, self.interval, self.verbose = quiet, 0.0 if verbose else interval, verbose
        self.log: RunLog | None = None
        self._last = 0.0
        self._started: dict[str, tuple[float, int, int]] = {}  # first time and count, last count
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}
        if sys.stderr is None or sys.stderr.closed:
            self.quiet = True
        elif not quiet and not verbose and _draws():
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

    @contextmanager
    def logged(self, path: Path) -> Iterator[RunLog]:
        """Inside the block, write everything into a log too, and the error that ends it."""
        self.log = RunLog(path)
        try:
            yield self.log
        except BaseException as error:
            self.log.failed(error)
            raise
        finally:
            self.log = None

    def say(self, text: str) -> None:
        """One line."""
        text = printable(text)
        if self.log is not None:
            self.log.write(text)
        if self.quiet:
            return
        if self._bar is not None:
            with self._giving_up():
                self._bar.console.print(text, markup=False, highlight=False)
        else:
            self._print(text)

    def update(self, name: str, done: int, total: int, note: str = "") -> None:
        """``done`` of ``total`` units of the task ``name`` are finished; ``note`` tells more."""
        if self.quiet and self.log is None:
            return
        note = printable(note)
        if self._bar is not None:
            self._draw(name, done, total, note)
        line = self._line(name, done, total, note)
        if line is None:
            return
        if self.log is not None:
            self.log.write(line)
        if self._bar is None and not self.quiet:
            self._print(line)

    def _draw(self, name: str, done: int, total: int, note: str) -> None:
        from rich.markup import escape

        described = escape(f"{name}, {note}" if note else name)
        with self._giving_up():
            if name not in self._tasks:
                self._tasks[name] = self._bar.add_task(name, total=total)
            self._bar.update(self._tasks[name], completed=done, total=total, description=described)

    def _line(self, name: str, done: int, total: int, note: str) -> str | None:
        """What there is to say in words; None where the last line is not old enough."""
        now = time.monotonic()
        if done <= self._started.get(name, (now, 0, done))[2]:
            self._started.pop(name, None)  # the same task once more: its clock starts anew
        start, first, _ = self._started.get(name, (now, done, done))
        self._started[name] = (start, first, done)
        if done < total and now - self._last < self.interval:
            return None
        self._last = now
        parts = [f"{name}: {done}/{total}", note] if note else [f"{name}: {done}/{total}"]
        if self.verbose:
            parts.append(f"{resident() / 1e9:.2f} GB")
        if done < total and done > first and now > start:
            parts.append(f"about {(now - start) / (done - first) * (total - done):.0f} s left")
        return ", ".join(parts)

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


@contextmanager
def showing(progress: Progress | bool | None) -> Iterator[Progress]:
    """The progress that a caller from Python asks for.

    Args:
        progress: one of the caller's own; True, False; None: shown where somebody watches, on a
            terminal or in a notebook.
    """
    if isinstance(progress, Progress):
        yield progress  # whoever made it closes it
        return
    with Progress(quiet=not (_draws() if progress is None else progress)) as made:
        yield made


def _draws() -> bool:
    """Whether stderr is where bars can be drawn: a terminal, or a notebook that has widgets."""
    if sys.stderr is None or sys.stderr.closed:
        return False
    if sys.stderr.isatty():
        return True
    if "IPython" not in sys.modules or importlib.util.find_spec("ipywidgets") is None:
        return False
    from rich.console import Console

    return Console().is_jupyter
