"""Checkpoint files as streams: the header first, then each tensor's bytes in its place.

No more than one tensor (or one piece of a file) is in memory. Files get their names only when they
are complete, and a failure leaves none behind.

Format: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, the data).
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch

from compress.errors import CompressError
from compress.system.files import sync
from compress.system.tensors_header import read_header

MAX_SHARD_BYTES = 5 * 10**9
COPY_BYTES = 16 * 2**20

_DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16",
    torch.uint16: "U16", torch.int32: "I32", torch.uint32: "U32", torch.int64: "I64",
    torch.uint64: "U64", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32",
    torch.float64: "F64", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


@dataclass(frozen=True)
class TensorSpec:
    """What a header says of a tensor: safetensors dtype name, shape, bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSpec:
        return cls(_DTYPES[tensor.dtype], tuple(tensor.shape), tensor.nbytes)

    @property
    def bytes_per_value(self) -> float:
        return self.nbytes / max(math.prod(self.shape), 1)


@dataclass
class _Shard:
    """One file to be: its tensors, where each starts, and the header that says so."""

    name: str
    specs: dict[str, TensorSpec]
    temporary: Path
    offsets: dict[str, int] = field(default_factory=dict)
    header: bytes = b""
    size: int = 0

    def lay_out(self, metadata: Mapping[str, str]) -> None:
        """Place wide dtypes first: readers view the bytes in place, which needs alignment."""
        order = sorted(self.specs, key=lambda n: -self.specs[n].bytes_per_value)
        entries: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
        position = 0
        for name in order:
            spec = self.specs[name]
            end = position + spec.nbytes
            entries[name] = {
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "data_offsets": [position, end],
            }
            self.offsets[name] = position
            position = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text
        self.size = len(self.header) + position


class ShardWriter:
    """Writes a checkpoint's safetensors files; a context manager that completes or cleans up.

    Tensors may be written in any order, each once. On leaving without an error the files take
    their names: ``model.safetensors``, or shards and ``model.safetensors.index.json``.

    Args:
        folder: exists or is made; files of ours by the same names are replaced.
        specs: every tensor of the checkpoint, in the order in which shards are filled.
        max_shard_bytes: a new shard starts where the next tensor would exceed it.
        stem: of the file names.
        metadata: strings for the header beside {"format": "pt"}.

    Raises:
        CompressError: on entering, if the disk has too little room; on writing, if it filled up
            after all; on leaving, if a tensor was not written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        specs: Mapping[str, TensorSpec],
        max_shard_bytes: int = MAX_SHARD_BYTES,
        stem: str = "model",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.stem = stem
        self._shards = self._plan(specs, max_shard_bytes)
        for shard in self._shards:
            shard.lay_out(metadata or {})
        self._of = {name: shard for shard in self._shards for name in shard.specs}
        self._written: set[str] = set()
        self._open: dict[str, BinaryIO] = {}
        self._stack = ExitStack()

    @property
    def total_bytes(self) -> int:
        """Bytes of all files, headers included, the index not."""
        return sum(shard.size for shard in self._shards)

    def _plan(self, specs: Mapping[str, TensorSpec], limit: int) -> list[_Shard]:
        groups: list[dict[str, TensorSpec]] = [{}]
        used = 0
        for name, spec in specs.items():
            if groups[-1] and used + spec.nbytes > limit:
                groups.append({})
                used = 0
            groups[-1][name] = spec
            used += spec.nbytes
        shards = []
        for number, group in enumerate(groups, 1):
            part = f"-{number:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
            name = f"{self.stem}{part}.safetensors"
            shards.append(_Shard(name, group, self.folder / f".{name}.tmp"))
        return shards

    def __enter__(self) -> ShardWriter:
        existing = next(p for p in (self.folder, *self.folder.absolute().parents) if p.exists())
        free = shutil.disk_usage(existing).free
        if self.total_bytes > free:
            raise self._disk_full(free)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for shard in self._shards:
                file = self._stack.enter_context(shard.temporary.open("wb"))
                self._open[shard.name] = file
                file.write(shard.header)
        except OSError as error:
            self._abort()
            raise self._translate(error) from error
        except BaseException:
            self._abort()
            raise
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor, whose shape and dtype must be the announced ones."""
        spec = TensorSpec.of(tensor)
        announced = self._of[name].specs[name]
        if spec != announced:
            raise CompressError(
                f"{name} as {announced.dtype} {list(announced.shape)}, as the header says",
                f"{spec.dtype} {list(spec.shape)}",
                "Nothing was written; run the step again",
            )
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self.write_bytes(name, [flat.numpy().data])

    def write_bytes(self, name: str, pieces: Iterable[bytes | memoryview]) -> None:
        """Write one tensor's bytes, little-endian, as a stream of pieces."""
        shard = self._of[name]
        file = self._open[shard.name]
        count = 0
        try:
            file.seek(len(shard.header) + shard.offsets[name])
            for piece in pieces:
                count += len(piece)
                file.write(piece)
        except OSError as error:
            raise self._translate(error) from error
        if count != shard.specs[name].nbytes:
            raise CompressError(
                f"{shard.specs[name].nbytes} bytes of {name}", str(count), "Run the step again"
            )
        self._written.add(name)

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        if kind is not None:
            self._abort()
            return
        try:
            self._complete()
        except OSError as error:
            self._abort()
            raise self._translate(error) from error
        except BaseException:
            self._abort()
            raise

    def _complete(self) -> None:
        missing = sorted(self._of.keys() - self._written)
        if missing:
            raise CompressError(
                "every announced tensor",
                f"none written for {', '.join(missing[:3])}",
                "Nothing was kept; run the step again",
            )
        for file in self._open.values():
            file.flush()
            os.fsync(file.fileno())
        self._stack.close()
        for shard in self._shards:
            if shard.temporary.stat().st_size != shard.size:
                raise OSError(errno.EIO, "a file that is shorter than what was written to it")
        for shard in self._shards:
            os.replace(shard.temporary, self.folder / shard.name)
        if len(self._shards) > 1:
            self._write_index()
        sync(self.folder)

    def _write_index(self) -> None:
        total = sum(spec.nbytes for shard in self._shards for spec in shard.specs.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: shard.name for name, shard in sorted(self._of.items())},
        }
        write_json(self.folder / f"{self.stem}.safetensors.index.json", index)

    def _abort(self) -> None:
        # A file whose buffer cannot be flushed (the disk is full) raises as it is closed.
        for file in self._open.values():
            with suppress(OSError):
                file.close()
        self._stack.pop_all()
        for shard in self._shards:
            shard.temporary.unlink(missing_ok=True)

    def _translate(self, error: OSError) -> CompressError:
        if error.errno == errno.ENOSPC:
            return self._disk_full(shutil.disk_usage(self.folder).free)
        return CompressError(
            f"to write the checkpoint to {self.folder}", str(error), "Check the disk"
        )

    def _disk_full(self, free: int) -> CompressError:
        return CompressError(
            f"{self.total_bytes:,} bytes of free disk for the checkpoint in {self.folder}",
            f"{free:,}",
            "Free some space or choose another folder; nothing was left half-written",
        )


def assemble(
    parts: Sequence[tuple[Path, str]],
    folder: str | os.PathLike[str],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Merge safetensors files into one checkpoint, copying bytes.

    Args:
        parts: (file, prefix): the tensors of ``file`` get ``prefix`` put before their names
            ("model.layers.0."; "" for names that are complete).
        folder: where the checkpoint goes; see :class:`ShardWriter`.

    Raises:
        CompressError: a damaged file, two tensors of one name, or a full disk.
    """
    specs: dict[str, TensorSpec] = {}
    for path, prefix in parts:
        for name, entry in read_header(Path(path)).items():
            if prefix + name in specs:
                raise CompressError("each tensor once", f"{prefix + name} again in {path}")
            specs[prefix + name] = TensorSpec(entry.dtype, entry.shape, entry.nbytes)
    with ShardWriter(folder, specs, max_shard_bytes) as writer:
        for path, prefix in parts:
            with Path(path).open("rb") as file:
                for name, (begin, end) in _spans(file).items():
                    writer.write_bytes(prefix + name, _read_pieces(file, begin, end))


def write_json(path: Path, value: object) -> None:
    """Write JSON under a temporary name, then rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _spans(file: BinaryIO) -> dict[str, tuple[int, int]]:
    """Return name -> (first byte, byte after the last) inside a safetensors file."""
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    start = 8 + length
    return {
        name: (start + item["data_offsets"][0], start + item["data_offsets"][1])
        for name, item in header.items()
    }


def _read_pieces(file: BinaryIO, begin: int, end: int) -> Iterable[bytes]:
    file.seek(begin)
    while begin < end:
        piece = file.read(min(COPY_BYTES, end - begin))
        if not piece:
            return
        begin += len(piece)
        yield piece
