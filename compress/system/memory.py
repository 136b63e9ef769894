"""Resident memory of this process: peak by stage, a limit that is enforced, giving pages back."""

from __future__ import annotations

import ctypes
import gc
import resource
from contextlib import suppress

import psutil

from compress.errors import CompressError

_MMAP_THRESHOLD, _LARGE = -3, 4 * 2**20  # of malloc.h; bytes


def resident() -> int:
    """Resident set size in bytes."""
    return psutil.Process().memory_info().rss


def reset_peak() -> None:
    """Start a new peak measurement where the kernel can (Linux); elsewhere the old one goes on."""
    with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak() -> int:
    """Highest resident set size in bytes since :func:`reset_peak`."""
    with suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def give_back() -> None:
    """Collect garbage and return freed heap pages to the system."""
    gc.collect()
    trim()


def map_large_blocks() -> None:
    """Let tensors of 4 MB and more go back to the system at once when they are freed.

    glibc raises its own limit for that to the largest block that was ever freed, at most 32 MB.
    Matrices below stay on the heap, whose gaps can hold as much as all that is alive. No effect
    with other allocators.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(_MMAP_THRESHOLD, _LARGE)


def trim() -> None:
    """Return freed heap pages to the system; glibc keeps them, and fragments add up by block."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def check_limit(limit: int | None) -> None:
    """Refuse to go on when more than ``limit`` bytes have been resident since the last reset.

    Raises:
        CompressError: with the figures and every knob that lowers them.
    """
    if limit is not None and peak() > limit:
        raise CompressError(
            f"at most {limit / 1e9:.2f} GB of resident memory (--max-memory)",
            f"{peak() / 1e9:.2f} GB",
            "Lower calibration.length or calibration.batch, leave out evaluation, or raise the "
            "limit; the same command goes on from the last finished block",
        )
