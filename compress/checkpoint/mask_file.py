"""N:M masks in a file of their own, at close to the entropy of the pattern.

A group of M weights that keeps N has one of S = C(M, N) patterns, so a mask is a row of digits in
base S, and as many digits as fit share a word: three in a byte for 2:4 (S = 6, 6^3 = 216), which
is 8 bits for 12 weights, 0.667 bit a weight. Groups run along the input dimension.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress.errors import CompressError, did_you_mean
from compress.linear.pattern import Pattern, row_pieces
from compress.system.shards import ShardWriter, TensorSpec

STEM = "masks"
FILE_NAME = f"{STEM}.safetensors"
ORDER = "lexicographic"  # of the kept positions: for 2:4, 01 02 03 12 13 23

_TABLE_BITS = 16  # of groups that are looked up in a table of all bit sets
_WORDS = ((torch.uint8, 8), (torch.uint16, 16), (torch.uint32, 32), (torch.int64, 63))


@dataclass(frozen=True)
class PackedPattern(Pattern):
    """A pattern whose masks can be packed into words."""

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m <= 62 or self.candidates > 2**16:
            raise CompressError(
                "a pattern N:M with 0 < N < M < 63 and at most 65,536 ways to choose",
                f"{self.n}:{self.m}",
                "Store the mask as zeros of the weights instead",
            )

    @functools.cached_property
    def word(self) -> tuple[torch.dtype, int]:
        """The word type and how many digits share it: the densest, and of those the narrowest."""
        fits = [(dtype, bits, _digits(self.candidates, bits)) for dtype, bits in _WORDS]
        fits = [(dtype, bits, digits) for dtype, bits, digits in fits if digits]
        dtype, _, digits = min(fits, key=lambda f: (-(-f[1] // 8) * 8 / f[2], f[1]))
        return dtype, digits

    @property
    def bits_per_weight(self) -> float:
        dtype, digits = self.word
        return dtype.itemsize * 8 / digits / self.m

    def words(self, shape: tuple[int, ...]) -> int:
        """Return how many words a mask of this shape takes.

        Raises:
            CompressError: M does not divide the last dimension.
        """
        if shape[-1] % self.m:
            raise CompressError(f"a number of input columns that {self.m} divides", str(shape[-1]))
        return -(-math.prod(shape) // self.m // self.word[1])


def nonzero_mask(weight: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Return the mask [out, in] of a weight that is N:M sparse, with exactly N kept in each group.

    Where a group has fewer than N nonzero values, zeros count as kept, first ones first.

    Raises:
        CompressError: a group has more than N nonzero values.
    """
    pattern.words(tuple(weight.shape))
    mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    for rows in row_pieces(*weight.shape):
        kept = (weight[rows] != 0).contiguous()
        groups = kept.view(-1, pattern.m)
        missing = pattern.n - _added(groups, torch.int8, [1] * pattern.m)
        if int(missing.min()) < 0:
            most = pattern.n - int(missing.min())
            raise CompressError(
                f"at most {pattern.n} nonzero weights of every {pattern.m}", str(most)
            )
        for column in groups.unbind(1) if bool(missing.any()) else ():
            filled = ~column & (missing > 0)
            column |= filled
            missing -= filled.to(missing.dtype)
        mask[rows] = kept
    return mask


def pack_mask(mask: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Return a mask as words, one-dimensional.

    Args:
        mask: bool [out, in], True where a weight is kept, N in every M along the last dimension.

    Raises:
        CompressError: a group does not keep exactly N, or M does not divide the last dimension.
    """
    count = pattern.words(tuple(mask.shape))
    groups = mask.reshape(-1, pattern.m)
    dtype, digits = pattern.word
    bits = [1 << position for position in range(pattern.m)]
    words = torch.empty(count, dtype=dtype, device=mask.device)
    for piece in row_pieces(count, digits * pattern.m):
        part = groups[piece.start * digits : piece.stop * digits]
        if bool((_added(part, torch.int8, [1] * pattern.m) != pattern.n).any()):
            raise CompressError(
                f"masks that keep {pattern.n} of every {pattern.m} weights",
                "a group that keeps another number",
            )
        target = words[piece]
        found = torch.zeros(len(target) * digits, dtype=torch.int64, device=mask.device)
        found[: len(part)] = _numbered(_added(part, torch.int64, bits), pattern)
        places = [pattern.candidates**place for place in range(digits)]
        target.copy_(_added(found.view(-1, digits), torch.int64, places))
    return words


def unpack_mask(
    words: torch.Tensor, pattern: PackedPattern, shape: tuple[int, ...]
) -> torch.Tensor:
    """Return the mask, bool of the given shape: the inverse of :func:`pack_mask`.

    Raises:
        CompressError: another number of words than the shape needs, or a word out of range.
    """
    count = pattern.words(shape)
    dtype, digits = pattern.word
    if words.dtype != dtype or words.shape != (count,):
        raise CompressError(
            f"{count} words of {dtype} for a {pattern.n}:{pattern.m} mask of {list(shape)}",
            f"{list(words.shape)} of {words.dtype}",
        )
    codes = _codes(pattern).to(words.device)
    groups = torch.empty(
        math.prod(shape) // pattern.m, pattern.m, dtype=torch.bool, device=words.device
    )
    for piece in row_pieces(count, digits * pattern.m):
        values = words[piece].to(torch.int64)
        if int(values.max()) >= pattern.candidates**digits or int(values.min()) < 0:
            raise CompressError("digits of the pattern's base", "a word out of range")
        target = groups[piece.start * digits : piece.stop * digits]
        for place in range(digits):
            code = codes[values % pattern.candidates][: len(target[place::digits])]
            values //= pattern.candidates
            for position, column in enumerate(target[place::digits].unbind(1)):
                column.copy_(code & (1 << position))
    return groups.view(shape)


def save_masks(
    folder: str | os.PathLike[str],
    layout: Mapping[str, tuple[PackedPattern, tuple[int, ...]]],
    masks: Iterable[tuple[str, torch.Tensor]],
    base_digest: str = "",
) -> Path:
    """Write ``masks.safetensors``, one mask in memory at a time.

    Args:
        layout: name of the weight -> its pattern and the mask's shape.
        masks: (name, mask) for every name of the layout, in any order.
        base_digest: what the masks were chosen for (a digest of the original checkpoint).

    Raises:
        CompressError: a mask is missing, of another shape, or not N:M; a full disk.
    """
    about = {
        name: {"n": pattern.n, "m": pattern.m, "shape": list(shape)}
        for name, (pattern, shape) in layout.items()
    }
    metadata = {"masks": json.dumps(about), "order": ORDER, "base_digest": base_digest}
    specs = {
        name: TensorSpec.of(torch.empty(p.words(shape), dtype=p.word[0], device="meta"))
        for name, (p, shape) in layout.items()
    }
    # One file, whatever its size: it is a thirtieth of the weights.
    total = sum(spec.nbytes for spec in specs.values())
    with ShardWriter(folder, specs, max(total, 1), STEM, metadata) as writer:
        for name, mask in masks:
            writer.write(name, pack_mask(mask, layout[name][0]))
    return Path(folder) / FILE_NAME


@dataclass(frozen=True)
class MaskInfo:
    """What a mask file says of one mask: its pattern, and the shape [out, in] of the weight."""

    pattern: PackedPattern
    shape: tuple[int, int]


def load_masks(path: str | os.PathLike[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name of the weight, mask bool [out, in]), one mask in memory at a time.

    Raises:
        CompressError: the file is damaged or was written in another order of patterns.
    """
    for name in mask_names(path):
        yield name, read_mask(path, name)


def read_mask(path: str | os.PathLike[str], name: str) -> torch.Tensor:
    """Return the mask of one weight, bool [out, in], True where it is kept; reads only its bytes.

    Raises:
        CompressError: the file has no mask of that name, is damaged or of another order.
    """
    with _opened(path) as (file, infos, _):
        if name not in infos:
            raise CompressError(
                f"a mask of {name} in {path}", f"{len(infos)} masks without it",
                did_you_mean(name, list(infos)) if len(infos) < 20 else "",
            )  # fmt: skip
        info = infos[name]
        return unpack_mask(file.get_tensor(name), info.pattern, info.shape)


def mask_layout(path: str | os.PathLike[str]) -> dict[str, MaskInfo]:
    """Return name of the weight -> pattern and shape of every mask; reads only the header.

    Raises:
        CompressError: the file is damaged or of another order.
    """
    with _opened(path) as (_, infos, _):
        return infos


def mask_names(path: str | os.PathLike[str]) -> list[str]:
    """Return the names of the weights that have a mask, as the model's class names them."""
    return list(mask_layout(path))


def base_digest(path: str | os.PathLike[str]) -> str:
    """Return the digest of the checkpoint that the masks were chosen for ("" if not recorded)."""
    with _opened(path) as (_, _, digest):
        return digest


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[Any, dict[str, MaskInfo], str]]:
    """Open a mask file: (reader of tensors, what its header says of each mask, base digest)."""
    from safetensors import SafetensorError, safe_open

    try:
        # Read, not mapped: mapped pages would count as resident memory.
        with safe_open(path, framework="pt", backend="pread") as file:
            metadata = file.metadata() or {}
            if metadata.get("order") != ORDER:
                raise CompressError(
                    f"a mask file in {ORDER} order", repr(metadata.get("order")),
                    "Give the masks.safetensors that lies beside a masked model", where=str(path),
                )  # fmt: skip
            infos = {
                name: MaskInfo(PackedPattern(about["n"], about["m"]), tuple(about["shape"]))
                for name, about in json.loads(metadata["masks"]).items()
            }
            yield file, infos, metadata.get("base_digest", "")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise CompressError("a readable mask file", str(error), where=str(path)) from error


def _digits(base: int, bits: int) -> int:
    digits = 0
    while base ** (digits + 1) <= 2**bits:
        digits += 1
    return digits


def _added(rows: torch.Tensor, dtype: torch.dtype, factors: list[int]) -> torch.Tensor:
    """Each row's sum of its entries times ``factors``, one a column, column after column: sums over
    a last dimension this short are several times slower."""
    found = torch.zeros(len(rows), dtype=dtype, device=rows.device)
    for column, factor in zip(rows.unbind(1), factors, strict=True):
        found.add_(column, alpha=factor)
    return found


@functools.cache
def _codes(pattern: Pattern) -> torch.Tensor:
    """Return the bit set of every candidate, in their order."""
    kept = itertools.combinations(range(pattern.m), pattern.n)
    return torch.tensor([sum(1 << position for position in chosen) for chosen in kept])


def _numbered(found: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Return the number of the candidate that each bit set is; all of them are candidates."""
    codes = _codes(pattern).to(found.device)
    if pattern.m > _TABLE_BITS:
        ordered, numbers = codes.sort()
        return numbers[torch.searchsorted(ordered, found)]
    table = torch.zeros(2**pattern.m, dtype=torch.int64, device=found.device)
    table[codes] = torch.arange(len(codes), device=found.device)
    return table[found]
