"""Which neighbouring blocks become one: the pair whose inputs are most alike, again and again."""

from __future__ import annotations

from collections.abc import Sequence

from compress.errors import CompressError
from compress.methods.depth.similarity import Similarity
from compress.models.groups import Groups, single


def choose_groups(
    similarity: Similarity, runs: Sequence[Sequence[int]], remove: int, most: int
) -> Groups:
    """Groups of neighbouring blocks, ``remove`` fewer than there are blocks.

    A pair of groups is as good as what enters the first block of the left one is like what enters
    the last block of the right one: the last block is the one that gets, once all are one, an input
    furthest from its own. So long groups are chosen only where the stream hardly turns. A pair
    whose choice would leave the wanted number out of reach is passed over.

    Args:
        similarity: [i][j] for j <= i, of what enters blocks i and j.
        runs: neighbouring blocks that may become one, in order; blocks in none stay alone.
        remove: number of blocks to lose.
        most: blocks in a group, at most.

    Returns:
        All blocks, in order.

    Raises:
        CompressError: fewer blocks can be lost than asked for.
    """
    groups, inside = single(len(similarity)), {b: n for n, run in enumerate(runs) for b in run}
    for left in range(remove, 0, -1):
        best, best_score = None, float("-inf")
        for position, (one, other) in enumerate(zip(groups, groups[1:], strict=False)):
            run = inside.get(one[0])
            if run is None or run != inside.get(other[0]) or len(one) + len(other) > most:
                continue
            score = similarity[other[-1]][one[0]]
            # Of equals the later pair: its error has fewer blocks left to grow in.
            if score >= best_score and removable(_joined(groups, position), runs, most) >= left - 1:
                best, best_score = position, score
        if best is None:
            raise CompressError(
                f"{remove} blocks that can become part of a neighbour",
                f"{remove - left}: {most} alike in a row make a group at most",
                "Remove fewer blocks, or raise `group`",
            )
        groups = _joined(groups, best)
    return groups


def removable(groups: Groups, runs: Sequence[Sequence[int]], most: int) -> int:
    """How many groups can still be lost: those of a run, put together from the left on, as many in
    a group as fit. No other partition of a row has fewer parts."""
    lost = 0
    for run in runs:
        members, filled = set(run), most
        for group in groups:
            if group[0] not in members:
                continue
            if filled + len(group) <= most:
                filled, lost = filled + len(group), lost + 1
            else:
                filled = len(group)
    return lost


def _joined(groups: Groups, position: int) -> Groups:
    return [*groups[:position], groups[position] + groups[position + 1], *groups[position + 2 :]]
