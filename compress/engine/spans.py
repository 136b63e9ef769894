"""Which blocks of a pass's result are worked on together."""

from __future__ import annotations

from collections.abc import Collection

from compress.errors import CompressError
from compress.models.groups import Groups

Spans = list[list[int]]  # indices of neighbouring blocks of the result


def spans_of(
    asked: Spans,
    groups: Groups,
    ranges: list[tuple[int, int]],
    worked: Collection[int],
    most: int,
) -> Spans:
    """All blocks of the result in order, those that learn together in one list.

    Args:
        asked: the lists of several.
        groups: what each block of the result is made from.
        ranges: the blocks (first, end) that each stands for, dropped ones among them.
        worked: blocks of the result that are worked on.
        most: blocks that may be in memory at once.

    Raises:
        CompressError: blocks that are no neighbours, are in two lists, are not worked on or are
            made of several; or more in memory than were announced.
    """
    chosen = sorted(asked)
    flat = [index for span in chosen for index in span]
    neighbours = all(s and s == list(range(s[0], s[-1] + 1)) for s in chosen)
    if not neighbours or len(set(flat)) < len(flat) or not set(flat) <= set(worked):
        raise CompressError(
            "spans of neighbouring blocks out of those that are worked on, each block once",
            repr(asked),
        )
    if any(len(groups[index]) > 1 for index in flat):
        raise CompressError("spans of blocks that are each made from one", repr(asked))
    if any(ranges[span[-1]][1] - ranges[span[0]][0] > most for span in chosen):
        raise CompressError(f"spans that hold at most {most} blocks", repr(asked))
    first = {span[0]: span for span in chosen}
    alone = [index for index in range(len(groups)) if index not in set(flat)]
    return [first.get(index, [index]) for index in sorted([*alone, *first])]
