"""Resident memory of this process: peak by stage, a limit that is enforced, giving pages back."""

from __future__ import annotations

import ctypes
import gc
import resource
from contextlib import suppress
from pathlib import Path, PurePosixPath

import psutil

from compress.errors import CompressError

_MMAP_THRESHOLD, _LARGE = -3, 4 * 2**20  # of malloc.h; bytes
# By version of control groups: the files of the limit and of what is used, and the field of
# memory.stat that counts, with groups below, the page cache that the kernel gives up first.
_CGROUP = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def resident() -> int:
    """Resident set size in bytes."""
    return psutil.Process().memory_info().rss


def available(root: Path = Path("/")) -> int:
    """Bytes that this process can still take: free on the machine and within its control groups.

    Containers and batch systems limit memory by control groups, of which the machine's own figures
    know nothing. A limit that cannot be read is none.

    Args:
        root: folder that holds ``proc`` and ``sys``.
    """
    rooms = [_room(folder, version) for folder, version in _groups(root)]
    return min([psutil.virtual_memory().available, *(r for r in rooms if r is not None)])


def _groups(root: Path) -> list[tuple[Path, int]]:
    """Folders and versions of the control groups that may limit this process's memory.

    All above a group limit it too. In a container the process's own path may be the one outside,
    which does not exist inside: there the root is its group.
    """
    mount = root / "sys" / "fs" / "cgroup"
    paths = {1: PurePosixPath(), 2: PurePosixPath()}
    with suppress(OSError, ValueError):
        for line in (root / "proc" / "self" / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            own = PurePosixPath(path.lstrip("/"))
            if ".." in own.parts:  # outside of what this process sees
                continue
            if "memory" in controllers.split(","):
                paths[1] = own
            elif not controllers:
                paths[2] = own
    mounts = {1: [mount / "memory"], 2: [mount, mount / "unified"]}
    return [(home / group, version) for version, path in paths.items() for home in mounts[version]
            for group in (path, *path.parents)]  # fmt: skip


def _room(group: Path, version: int) -> int | None:
    """What a control group leaves, in bytes; None where it sets no limit."""
    limit, used, cache = _CGROUP[version]
    try:
        room = int((group / limit).read_text()) - int((group / used).read_text())
    except (OSError, ValueError):  # not there, not to be read, or "max"
        return None
    with suppress(OSError, ValueError):
        for line in (group / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == cache:
                room += int(value)
    return max(room, 0)


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
