"""The tensors of a checkpoint by name: headers first, values one at a time.

:meth:`TensorIndex.open` reads headers and file sizes only, so a damaged checkpoint is refused in
well under a second, before anything is computed. Values are read, not memory-mapped, and no
handle stays open: mapped pages count in the resident size of the process, and a checkpoint larger
than memory would seem to fill it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from compress.errors import CompressError, did_you_mean
from compress.system.tensors_header import (
    INDEX,
    SINGLE,
    Entry,
    no_weights,
    read_header,
    read_weight_map,
)

_TORCH = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16,
    "U16": torch.uint16, "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64,
    "U64": torch.uint64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64, "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


_PIECE = 2**24  # bytes that are compared at a time


class TensorIndex:
    """The tensors of one checkpoint folder; build it with :meth:`open`.

    Attributes:
        folder: the checkpoint folder.
        files: the safetensors files, sorted by name.
    """

    def __init__(self, folder: Path, entries: Mapping[str, Entry], files: Iterable[Path]) -> None:
        self.folder = folder
        self.files = tuple(sorted(files))
        self._entries = dict(entries)
        self._stamps = {path: _stamp(path.stat()) for path in self.files}

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> TensorIndex:
        """Index ``folder`` from its headers; no tensor is read.

        Raises:
            CompressError: no folder, no weights, pickled weights only, a missing, truncated or
                corrupt file, or an index that does not agree with its shards.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CompressError("a folder with a checkpoint", f"{str(folder)!r}, which is none")
        if (folder / SINGLE).exists():  # the order in which transformers looks
            entries = read_header(folder / SINGLE)
            return cls(folder, entries, [folder / SINGLE])
        if (folder / INDEX).exists():
            return cls._open_sharded(folder)
        raise no_weights(folder)

    @classmethod
    def _open_sharded(cls, folder: Path) -> TensorIndex:
        weight_map = read_weight_map(folder / INDEX)
        shards: dict[str, dict[str, Entry]] = {}
        for shard in sorted(set(weight_map.values())):
            if not (folder / shard).is_file():
                raise CompressError(
                    f"the shard {shard} that {INDEX} names", f"no such file in {folder}",
                    "Fetch the missing file again, or the whole checkpoint",
                )  # fmt: skip
            shards[shard] = read_header(folder / shard)
        entries = {}
        for name, shard in weight_map.items():
            if name not in shards[shard]:
                raise CompressError(
                    f"the tensor {name} in {shard}, where {INDEX} puts it",
                    "a shard without it",
                    "The index and the shards are not of one checkpoint: fetch both again",
                )
            entries[name] = shards[shard][name]
        return cls(folder, entries, [folder / shard for shard in shards])

    def names(self) -> list[str]:
        """The tensor names, in the order of the checkpoint."""
        return list(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def entry(self, name: str) -> Entry:
        """The header entry of ``name``; a CompressError with the closest names if there is none."""
        try:
            return self._entries[name]
        except KeyError:
            raise CompressError(
                f"a tensor of {self.folder}", repr(name), _closest(name, self._entries)
            ) from None

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The torch dtype in which ``name`` is stored."""
        stored = self.entry(name).dtype
        if stored not in _TORCH:
            raise CompressError(
                "a tensor of a type that torch can hold", f"{name} stored as {stored}"
            )
        return _TORCH[stored]

    def nbytes(self, name: str) -> int:
        """Bytes of ``name`` in its file."""
        return self.entry(name).nbytes

    def total_bytes(self) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(entry.nbytes for entry in self._entries.values())

    def file(self, name: str) -> Path:
        return self.entry(name).file

    def get(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Read one tensor (into memory of its own), converted to ``dtype`` if given."""
        return self.get_many([name], dtype)[name]

    def get_many(
        self, names: Iterable[str], dtype: torch.dtype | None = None
    ) -> dict[str, torch.Tensor]:
        """Read several tensors, each file opened once and closed again."""
        names = list(names)
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.file(name), []).append(name)
        tensors: dict[str, torch.Tensor] = {}
        for path, held in by_file.items():
            # In the order of the file: the disk likes it, and the caller's order is restored below.
            held.sort(key=lambda name: self._entries[name].offset)
            with self._opened(path) as file:
                for name in held:
                    tensor = self._read(file, name)
                    tensors[name] = tensor if dtype is None else tensor.to(dtype)
        return {name: tensors[name] for name in names}

    def get_slice(self, name: str, number: int) -> torch.Tensor:
        """Read ``tensor[number]`` alone, into memory of its own."""
        entry = self.entry(name)
        part = replace(
            entry, shape=entry.shape[1:], nbytes=entry.nbytes // entry.shape[0],
            offset=entry.offset + number * (entry.nbytes // entry.shape[0]),
        )  # fmt: skip
        with self._opened(entry.file) as file:
            return self._read(file, name, part)

    @contextlib.contextmanager
    def _opened(self, path: Path) -> Iterator[io.RawIOBase]:
        """One of the files, which must still be the one whose header was read.

        Raises:
            CompressError: it is gone, or something has written to it since.
        """
        try:
            with path.open("rb", buffering=0) as file:
                if _stamp(os.fstat(file.fileno())) != self._stamps[path]:
                    raise CompressError(
                        f"{path} as it was when it was first read", "a file that has changed since",
                        "Leave the model alone while it is worked on; give the same command again "
                        "once it is as it was",
                    )  # fmt: skip
                yield file
        except FileNotFoundError as error:
            raise CompressError(
                f"the weights in {path}", "a file that is gone since it was first read",
                "Put it back and give the same command again",
            ) from error  # fmt: skip

    def _read(self, file: io.RawIOBase, name: str, part: Entry | None = None) -> torch.Tensor:
        """Read one tensor, or a part of it, from its open file into memory of its own."""
        entry, dtype = part or self.entry(name), self.dtype(name)
        buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
        view = memoryview(buffer.numpy())
        file.seek(entry.offset)
        done = 0
        while done < entry.nbytes:  # one call reads at most 2 GiB
            count = file.readinto(view[done:])
            if not count:
                raise CompressError(
                    f"{entry.nbytes} bytes of {name} in {entry.file}", f"only {done}",
                    "The file became shorter since it was opened: fetch it again",
                )  # fmt: skip
            done += count
        return buffer.view(dtype).view(entry.shape)

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors are stored as the same bytes of the same shape; read in pieces."""
        a, b = self.entry(one), self.entry(other)
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return False
        with a.file.open("rb") as first, b.file.open("rb") as second:
            first.seek(a.offset)
            second.seek(b.offset)
            for start in range(0, a.nbytes, _PIECE):
                count = min(_PIECE, a.nbytes - start)
                if first.read(count) != second.read(count):
                    return False
        return True

    def check_finite(self, names: Iterable[str]) -> None:
        """Refuse NaN and infinite values, reading one tensor at a time.

        Raises:
            CompressError: naming the first tensor that holds such values and how many it holds.
        """
        for name in names:
            if self.dtype(name).is_floating_point:
                check_finite(name, self.get(name), where=self.file(name).name)

    def digest(self) -> str:
        """sha256 over the names and contents of the files, as hex.

        A file is hashed once per process as long as its size and modification time stay the same.
        """
        total = hashlib.sha256()
        for path in self.files:
            total.update(f"{path.name}\0{file_sha256(path)}\n".encode())
        return total.hexdigest()


def check_finite(name: str, tensor: torch.Tensor, *, where: str = "") -> None:
    """Raise a CompressError if ``tensor`` holds a NaN or an infinity."""
    # Summing is one pass without a mask; only a suspicious sum pays for the exact look. Narrow
    # floats are widened first: their sum can overflow, and float8 has no arithmetic at all.
    wide = tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
    if math.isfinite(wide.sum().item()):
        return
    bad = int((~torch.isfinite(wide)).sum())
    if bad:
        raise CompressError(
            "finite weights",
            f"{bad} NaN or infinite values of {tensor.numel()} in {name}",
            "The checkpoint is damaged or its training diverged: use another one",
            where=where,
        )


def _stamp(stat: os.stat_result) -> tuple[int, int, int]:
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def file_sha256(path: Path) -> str:
    """sha256 of a file as hex, streamed; remembered in memory while size and mtime are the same."""
    stat = path.stat()
    return _sha256(path.resolve(), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _closest(name: str, known: Mapping[str, object]) -> str:
    # The fall-back of did_you_mean lists every name, which for a checkpoint is thousands.
    return did_you_mean(name, list(known)) if len(known) <= 20 else _close_only(name, known)


def _close_only(name: str, known: Mapping[str, object]) -> str:
    answer = did_you_mean(name, list(known))
    return answer if answer.startswith("Did") else f"The checkpoint has {len(known)} tensors"
