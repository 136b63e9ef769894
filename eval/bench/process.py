"""Fresh processes, measured from outside: wall time, processor time, peak resident memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.errors import CompressError

_LAUNCHER = Path(__file__).with_name("launch.py")


@dataclass(frozen=True)
class Usage:
    """What a process took from its start to its end, imports included.

    Attributes:
        seconds: on the wall clock.
        cpu_seconds: user and system time of all threads; steadier than the clock on a busy machine.
        peak_bytes: largest resident set size, mapped file pages included (getrusage(2)).
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def measure(command: Sequence[str], log: Path) -> Usage:
    """Run ``command`` to its end with its output in ``log``.

    Raises:
        CompressError: it failed; the end of the log is shown.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    launched = subprocess.run(
        [sys.executable, "-I", str(_LAUNCHER), str(log), *command],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    result = json.loads(launched.stdout)
    if result.pop("status"):
        raise failed(command, log)
    return Usage(**result)


def failed(command: Sequence[str], log: Path) -> CompressError:
    """The error for a command that ended badly."""
    tail = "\n".join(log.read_text(errors="replace").strip().splitlines()[-12:])
    return CompressError(f"`{' '.join(command)}` to succeed", tail, f"The whole output is in {log}")
