"""What a step has taken so far, over all processes that worked on it."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path

from compress.system import memory

_EVERY = 5.0  # seconds between two notes


class StepClock:
    """Time and memory of a step that may be killed and go on.

    What a process took before it was killed is lost but for what :meth:`note` has written by then.

    Args:
        path: file in which it is kept; the one there is from earlier processes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._before = _read(path)
        self._clock, self._processor = time.perf_counter(), time.process_time()
        self._noted = self._clock

    def totals(self) -> dict[str, float]:
        """``seconds`` and ``cpu_seconds``, and ``peak_bytes`` of the process that held most."""
        now = time.perf_counter() - self._clock, time.process_time() - self._processor
        seconds, cpu_seconds, peak = self._before
        return {
            "seconds": seconds + now[0],
            "cpu_seconds": cpu_seconds + now[1],
            "peak_bytes": max(int(peak), memory.peak()),
        }

    def note(self) -> None:
        """Write the totals down, where it is time to. Nothing depends on this file but a figure in
        the report, so nobody waits for the disk, and a full one is no reason to stop."""
        now = time.perf_counter()
        if now - self._noted < _EVERY:
            return
        self._noted = now
        temporary = self.path.with_name(self.path.name + ".partial")
        with suppress(OSError):
            temporary.write_text(json.dumps(self.totals()), encoding="utf-8")
            os.replace(temporary, self.path)


def _read(path: Path) -> tuple[float, float, float]:
    """Seconds, processor seconds, bytes; nothing where there is no file, or not a whole one."""
    names = "seconds", "cpu_seconds", "peak_bytes"
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(path.read_text("utf-8"))
        seconds, cpu_seconds, peak = (float(found[name]) for name in names)
        return seconds, cpu_seconds, peak
    return 0.0, 0.0, 0.0
