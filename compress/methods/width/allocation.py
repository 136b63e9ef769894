"""How many units each block keeps when all blocks together keep a given number."""

from __future__ import annotations

from collections.abc import Sequence


def rounded_width(units: int, share: float, round_to: int) -> int:
    """Units kept of ``units`` when ``share`` go: the nearest multiple, at least one of them."""
    if share == 0:
        return units
    return min(units, max(1, int(units * (1 - share) / round_to + 0.5)) * round_to)


def allocate(
    scores: Sequence[Sequence[float]],
    total: int,
    round_to: int,
    min_share: float,
    max_share: float,
) -> list[int]:
    """Let the least important chunks of units go first, wherever they are.

    Scores are made comparable by dividing them by their sum in the block; the units of a block go
    in ascending order, ``round_to`` at a time, and of all blocks' next chunks the one with the
    least mean score goes.

    Args:
        scores: importance of each unit, a list a block.
        total: units that all blocks together keep (they keep fewer by less than one chunk where
            sizes do not divide).
        min_share, max_share: bounds on the share that one block loses.

    Returns:
        Units kept, a number a block: multiples of ``round_to``, or all.
    """
    chunks: list[tuple[float, int, int, int]] = []  # score, block, position in the block, size
    kept = [len(block) for block in scores]
    for index, block in enumerate(scores):
        norm = sum(block) or 1.0
        ascending = sorted(score / norm for score in block)
        widths = _widths(len(block), round_to)
        bounds = list(zip(widths, widths[1:], strict=False))
        for position, (wide, narrow) in enumerate(bounds):
            if 1 - narrow / len(block) > max_share + 1e-9:
                break
            part = ascending[len(block) - wide : len(block) - narrow]
            # The first ones go in any case where the share must not be smaller.
            forced = 1 - wide / len(block) < min_share - 1e-9
            score = float("-inf") if forced else sum(part) / len(part)
            chunks.append((score, index, position, wide - narrow))
    for score, index, _, size in sorted(chunks):
        if score > float("-inf") and sum(kept) <= total:
            break
        kept[index] -= size
    return kept


def _widths(units: int, round_to: int) -> list[int]:
    """Widths that a block may have, from all units down to one multiple of ``round_to``."""
    multiples = list(range(units // round_to * round_to, 0, -round_to))
    return multiples if multiples and multiples[0] == units else [units, *multiples]
