"""Sets of (block, path) as a few regular expressions, the way compressed-tensors names modules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping


def target_patterns(
    members: Iterable[tuple[int, str]], num_blocks: int, blocks_path: str
) -> list[str]:
    """Return ``re:`` patterns that match exactly the given linears.

    Any prefix is allowed before the name of the block list, so that the patterns hold for a model
    with a head and for its bare backbone. Paths with the same set of blocks share a pattern.

    Args:
        members: (block index, path inside the block).
        blocks_path: "model.layers"; only its last part is used.
    """
    by_path: dict[str, set[int]] = {}
    for index, path in members:
        by_path.setdefault(path, set()).add(index)
    by_blocks: dict[tuple[int, ...], list[str]] = {}
    for path, indices in by_path.items():
        by_blocks.setdefault(tuple(sorted(indices)), []).append(path)
    container = re.escape(blocks_path.rpartition(".")[2])
    patterns = []
    for indices, paths in sorted(by_blocks.items()):
        everywhere = len(indices) == num_blocks
        blocks = r"\d+" if everywhere else "(" + "|".join(map(str, indices)) + ")"
        names = "|".join(re.escape(p) for p in sorted(paths))
        patterns.append(rf"re:(.*\.)?{container}\.{blocks}\.({names})$")
    return patterns


def parse_pattern(pattern: str, num_blocks: int) -> list[tuple[int, str]] | None:
    """Return the (block, path) pairs of one pattern of :func:`target_patterns`, or None."""
    match = re.fullmatch(
        r"re:\(\.\*\\\.\)\?[^()]+\\\.(?:\\d\+|\(([\d|]+)\))\\\.\(([^()]*)\)\$", pattern
    )
    if match is None:
        return None
    blocks, names = match.groups()
    indices = range(num_blocks) if blocks is None else map(int, blocks.split("|"))
    paths = [re.sub(r"\\(.)", r"\1", name) for name in names.split("|")]
    return [(index, path) for index in indices for path in paths]


def group_by_value(
    blocks: Iterable[Mapping[str, object]],
) -> list[tuple[object, list[tuple[int, str]]]]:
    """Turn {path: value} of every block into (value, its linears), in the order of appearance."""
    groups: list[tuple[object, list[tuple[int, str]]]] = []
    for index, block in enumerate(blocks):
        for path, value in block.items():
            for known, members in groups:
                if known == value:
                    members.append((index, path))
                    break
            else:
                groups.append((value, [(index, path)]))
    return groups
