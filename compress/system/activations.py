"""Activations of all calibration batches, kept in a file.

Plain reads and writes rather than a memory map: mapped pages count as resident memory of the
process, the page cache does not, and both are as fast while the file fits in memory.
"""

from __future__ import annotations

import math
import os
import weakref
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress.errors import CompressError


class LostActivations(CompressError):
    """What an interrupted run left behind is gone or changed."""


class Activations:
    """A tensor a calibration batch, stored one after the other in a file.

    All batches have the same width in the last dimension; their shapes are remembered from the
    first write. Re-opening a file after a crash needs the shapes, which the caller journals.

    Args:
        path: the file; it grows as batches are written.
        shapes: shape of each batch, for a file that exists already.
        checked: keep a checksum of what is written (a tenth of a second a 100 MB).
        dtype: that they are stored in; None: the type of the batch that is written first.
    """

    def __init__(
        self,
        path: Path,
        shapes: list[list[int]] | None = None,
        checked: bool = False,
        dtype: torch.dtype | None = torch.float32,
    ) -> None:
        self.path, self.checked, self._dtype = path, checked, dtype
        self.dtype = dtype
        self.shapes: list[tuple[int, ...]] = []
        self._starts = [0]  # of each batch and of the next one, in numbers
        for shape in shapes or []:
            self._append(tuple(shape))
        self.checksum = 0  # CRC-32 of all batches, valid while they are written once and in order
        flags = os.O_RDWR | os.O_CREAT | (0 if shapes else os.O_TRUNC)
        self._fd = os.open(path, flags, 0o600)
        self._closing = weakref.finalize(self, os.close, self._fd)  # with us, at the latest

    @classmethod
    def resume(cls, path: Path, state: dict[str, Any]) -> Activations:
        """Open what an interrupted run left, as :meth:`state` described it.

        Raises:
            LostActivations: the file does not hold what was written.
        """
        found = cls(path, shapes=state["shapes"]) if path.is_file() else None
        if found is None or not found.verify(state["checksum"]):
            if found is not None:
                found.close()
            raise LostActivations(
                "the activations that the interrupted run left behind",
                f"another content in {path.name}" if found else f"no {path.name}",
            )
        found.checksum = state["checksum"]
        return found

    def state(self) -> dict[str, Any]:
        """What :meth:`resume` must know, JSON-able."""
        shapes = [list(s) for s in self.shapes]
        return {"file": self.path.name, "shapes": shapes, "checksum": self.checksum}

    def __len__(self) -> int:
        return len(self.shapes)

    def write(self, index: int, value: torch.Tensor) -> None:
        """Store batch ``index``; batches are first written in order and may be rewritten.

        Raises:
            CompressError: the disk is full.
        """
        if index == len(self.shapes):
            self._append(tuple(value.shape))
        if self.dtype is None:
            self.dtype = value.dtype
        data = _bytes(value.detach().to("cpu", self.dtype).contiguous())
        offset = self._offset(index)
        view = memoryview(data)
        if self.checked:
            self.checksum = zlib.crc32(view, self.checksum)
        try:
            while len(view):
                written = os.pwrite(self._fd, view, offset)
                view, offset = view[written:], offset + written
        except OSError as error:
            free = os.statvfs(self.path.parent)
            raise CompressError(
                f"room on the disk for activations ({len(data) / 1e6:.0f} MB a batch)",
                f"{error.strerror} with {free.f_bavail * free.f_frsize / 1e6:.0f} MB free",
                "Free some space, or lower calibration.samples or calibration.length, and run the "
                "same command again: it goes on from the last finished block",
            ) from error

    def read(self, index: int) -> torch.Tensor:
        """Return batch ``index`` (CPU, memory of its own)."""
        out = torch.empty(self.shapes[index], dtype=self.dtype)
        view = memoryview(_bytes(out))
        offset = self._offset(index)
        while len(view):
            got = os.preadv(self._fd, [view], offset)
            if got == 0:
                raise CompressError(
                    f"{len(view)} more bytes of activations in {self.path.name}",
                    "the end of the file",
                    "The work folder was changed by something else; start the run in a new folder",
                )
            view, offset = view[got:], offset + got
        return out

    def verify(self, checksum: int) -> bool:
        """True when the file still holds what was written (a power cut may have lost pages)."""
        try:
            found = 0
            for i in range(len(self)):
                found = zlib.crc32(_bytes(self.read(i)), found)
        except CompressError:
            return False
        return found == checksum

    def rewind(self) -> None:
        """Forget all batches, but keep the file: to write over what a machine has in memory already
        is several times as fast as to write what is new to it."""
        self.shapes, self._starts, self.checksum, self.dtype = [], [0], 0, self._dtype

    def close(self) -> None:
        self._closing()
        self._fd = -1  # the number may be another file's soon

    def remove(self) -> None:
        """Close and delete the file."""
        self.close()
        self.path.unlink(missing_ok=True)

    def _append(self, shape: tuple[int, ...]) -> None:
        self.shapes.append(shape)
        self._starts.append(self._starts[-1] + math.prod(shape))

    def _offset(self, index: int) -> int:
        return self._starts[index] * (4 if self.dtype is None else self.dtype.itemsize)


def _bytes(value: torch.Tensor) -> np.ndarray:
    """The memory of a contiguous tensor."""
    return value.reshape(-1).view(torch.uint8).numpy()
