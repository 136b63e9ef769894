"""The headers of safetensors files and their index: read, checked, and refused when damaged.

Format: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, the data).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from compress.errors import CompressError
from compress.system.intake import parse_json, read_limited, regular_file

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Pickles by the names that libraries give them; opening one can run any code.
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_LONGEST_HEADER = 100_000_000  # the limit of the safetensors library itself
_LARGEST_DIMENSION = 2**48  # no tensor that fits a disk has a larger one


@dataclass(frozen=True)
class Entry:
    """One tensor as its header states it: ``nbytes`` bytes from ``offset`` of ``file``."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


def read_header(path: Path) -> dict[str, Entry]:
    """Read and check the header of one safetensors file: name -> entry, no tensor is read.

    Raises:
        CompressError: no regular file, or one that is truncated, has bytes too many, or whose
            header is not one.
    """
    regular_file(path, f"the safetensors file {path.name}", "Fetch this file again")
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > _LONGEST_HEADER:
            raise _corrupt(path, "no safetensors header at its start")
        if 8 + length > size:
            raise _truncated(path, f"{size} bytes, fewer than its header alone ({8 + length})")
        text = file.read(length)
    try:
        header = parse_json(text)
        header.pop("__metadata__", None)
        spans = {name: _span(item) for name, item in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _corrupt(path, f"a header that does not parse ({error})") from error
    _check_spans(path, spans, size - 8 - length)
    return {
        name: Entry(path, 8 + length + begin, shape, dtype, end - begin)
        for name, (dtype, shape, begin, end) in spans.items()
    }


def _span(item: dict) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype, shape, begin, end) of one header entry; a ValueError or TypeError if it has others.

    JSON has one kind of number: 1e400, NaN and 2.0 parse, and a list may have any length.
    """
    begin, end = item["data_offsets"]
    shape = item["shape"]
    if not isinstance(shape, list):
        raise ValueError(f"a shape that is no list: {str(shape)[:40]!r}")
    for number in (*shape, begin, end):
        if type(number) is not int or abs(number) > _LARGEST_DIMENSION:
            raise ValueError(f"a size or an offset of {str(number)[:40]!r}")
    return str(item["dtype"]), tuple(shape), begin, end


def _check_spans(path: Path, spans: dict[str, tuple], available: int) -> None:
    """Check that the tensors fill the data area exactly, with neither a gap nor an overlap."""
    position = 0
    for name, (dtype, shape, begin, end) in sorted(spans.items(), key=lambda kv: kv[1][2:]):
        if dtype not in _BITS or min(shape, default=1) < 0:
            raise _corrupt(path, f"a header with {name} as {dtype} {list(shape)}")
        if begin != position or (end - begin) * 8 != math.prod(shape) * _BITS[dtype]:
            raise _corrupt(path, f"a header whose bytes for {name} do not fit its shape")
        position = end
    if position > available:
        raise _truncated(path, f"{available} bytes of data of {position}")
    if position < available:
        raise _corrupt(path, f"{available - position} bytes after the last tensor")


def read_weight_map(path: Path) -> dict[str, str]:
    try:
        text = read_limited(path, f"an index in {path.name}", _LONGEST_HEADER).decode("utf-8")
        weight_map = parse_json(text)["weight_map"]
        pairs = dict(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _corrupt(path, f"no readable weight_map ({error})") from error
    for name, shard in pairs.items():
        # A shard is a file beside its index; anything else could reach out of the folder.
        plain = isinstance(shard, str) and Path(shard).name == shard and "\\" not in shard
        if not plain or not shard.endswith(".safetensors"):
            raise _corrupt(path, f"{name} in {shard!r}, which is no safetensors file beside it")
    if not pairs:
        raise _corrupt(path, "an empty weight_map")
    return pairs


def pickles_in(folder: Path) -> list[str]:
    """Names of the pickled weight files of a folder (not of the side files of a trainer)."""
    names = {path.name for pattern in PICKLES for path in folder.glob(pattern)}
    side = {"training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state.pth"}
    return sorted(names - side)


def pickle_refused(origin: str, names: list[str]) -> CompressError:
    """The error for a checkpoint that has pickled weights only, with the way to convert it."""
    return CompressError(
        f"weights in safetensors in {origin}",
        f"pickled weights only ({', '.join(names[:3])}), and opening a pickle can run any code",
        "If you trust them, convert them once in an isolated place (a container without network): "
        "from transformers import AutoModelForCausalLM, AutoTokenizer; "
        f"AutoModelForCausalLM.from_pretrained({origin!r}).save_pretrained('converted'); "
        f"AutoTokenizer.from_pretrained({origin!r}).save_pretrained('converted') "
        "(take the Auto class of the model's kind), then use the folder 'converted'",
    )


def no_weights(folder: Path) -> CompressError:
    pickles = pickles_in(folder)
    if pickles:
        return pickle_refused(str(folder), pickles)
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        return CompressError(
            f"{SINGLE} or {INDEX} in {folder}",
            f"neither, but {', '.join(others[:3])}" + (" ..." if len(others) > 3 else ""),
            "Shards need their index file; a single file must have the name model.safetensors",
        )
    return CompressError(
        f"weights ({SINGLE}, or {INDEX} with its shards) in {folder}", "none",
        "Fetch the checkpoint again with its weights",
    )  # fmt: skip


def _truncated(path: Path, got: str) -> CompressError:
    return CompressError(
        f"the whole of {path.name} in {path.parent}", f"{got}: the file is truncated",
        "Fetch this file again",
    )  # fmt: skip


def _corrupt(path: Path, got: str) -> CompressError:
    return CompressError(
        f"an intact {path.name} in {path.parent}", f"{got}: the file is corrupt",
        "Fetch this file again",
    )  # fmt: skip
