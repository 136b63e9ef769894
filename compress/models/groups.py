"""Blocks that become other blocks: which of them each block of the result was made from."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from compress.errors import CompressError

Groups = list[list[int]]  # indices of neighbouring blocks, a list a block of the result


def check_groups(groups: Groups, count: int, most: int) -> None:
    """Refuse what is no grouping of ``count`` blocks.

    Args:
        most: blocks in a group, at most.

    Raises:
        CompressError: no group, an empty one, blocks that are not there, twice, out of order or not
            neighbours, or more in a group than were announced.
    """
    flat = [index for group in groups for index in group]
    rising = all(a < b for a, b in zip(flat, flat[1:], strict=False))
    neighbours = all(group and group == list(range(group[0], group[-1] + 1)) for group in groups)
    if not flat or not rising or not neighbours or flat[0] < 0 or flat[-1] >= count:
        raise CompressError(
            f"groups of neighbouring blocks out of {count}, in order, each block once", repr(groups)
        )
    if max(map(len, groups)) > most:
        raise CompressError(f"at most {most} blocks in a group", repr(groups))


def single(count: int) -> Groups:
    """Each block by itself."""
    return [[index] for index in range(count)]


def covered(groups: Groups, count: int) -> list[tuple[int, int]]:
    """The blocks (first, end) whose work each block of the result does.

    Blocks in no group belong to the group in front of them, or to the first one.

    >>> covered([[0], [2, 3]], 5)
    [(0, 2), (2, 5)]
    """
    starts = [0, *(group[0] for group in groups[1:])]
    return list(zip(starts, [*starts[1:], count], strict=True))


def merged_origins(origins: Sequence[tuple[int, int]], groups: Groups) -> list[tuple[int, int]]:
    """The blocks (first, end) of an earlier model that blocks stand for, after a grouping.

    Args:
        origins: what each block stood for before it.

    >>> merged_origins([(0, 1), (1, 3), (3, 4)], [[0], [1, 2]])
    [(0, 1), (1, 4)]
    """
    return [
        (origins[first][0], origins[end - 1][1]) for first, end in covered(groups, len(origins))
    ]


def composed(earlier: Groups | None, later: Groups) -> Groups:
    """The groups of two groupings, one after the other.

    >>> composed([[0], [1, 2], [3]], [[0, 1], [2]])
    [[0, 1, 2], [3]]
    """
    if earlier is None:
        return later
    return [[index for block in group for index in earlier[block]] for group in later]


def set_blocks(model: nn.Module, path: str, blocks: list[nn.Module]) -> None:
    """Give a live model another list of blocks, numbered from 0.

    Args:
        path: of the list in the model.
    """
    for index, block in enumerate(blocks):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.ModuleList(blocks))
