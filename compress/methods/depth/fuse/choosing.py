"""Which blocks can be fused into neighbours, and which neighbours take part."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from compress.methods.depth.alike import alike_runs
from compress.models.anatomy import BlockAnatomy


def fusible(blocks: Sequence[BlockAnatomy], free: Collection[int]) -> list[int]:
    """Blocks that can go into neighbours of their build.

    A block that is gone belongs to the one in front of it, which is therefore of its build, except
    that the first block of all can go into those behind it.

    Args:
        free: indices of the blocks that may go.
    """
    runs = alike_runs(blocks, range(len(blocks)))
    return [i for run in runs if len(run) > 1 for i in run if i in free and (i == 0 or i > run[0])]


def losable(blocks: Sequence[BlockAnatomy], free: Collection[int]) -> list[int]:
    """Blocks that could all go, one after the other: of each run of one build all but one."""
    runs = alike_runs(blocks, range(len(blocks)))
    found = [[i for i in run if i in free and (i == 0 or i > run[0])] for run in runs]
    return [
        index
        for run, fit in zip(runs, found, strict=True)
        for index in fit[max(0, len(fit) + 1 - len(run)) :]
    ]


def window(blocks: Sequence[BlockAnatomy], removed: int, neighbours: int) -> tuple[int, int]:
    """The blocks (first, end) around one that goes, itself among them.

    As many in front of it as behind, one more in front where the number is odd; at the ends of a
    run of blocks of one build the group is moved, and no larger than the run.
    """
    runs = alike_runs(blocks, range(len(blocks)))
    (run,) = (run for run in runs if removed in run)
    size = min(neighbours + 1, len(run))
    first = min(max(removed - size // 2, run[0]), run[-1] + 1 - size)
    return first, first + size
