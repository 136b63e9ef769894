"""A lower triangular matrix as shades of characters, which any terminal and any file can show."""

from __future__ import annotations

from collections.abc import Sequence

_SHADES = " .:-=+*#%@"


def heat_map(rows: Sequence[Sequence[float]]) -> str:
    """Lines of two characters an entry, the least one blank and the largest one darkest.

    In front of a row is its number, behind it the entry beside the diagonal (how far it is from
    its neighbour).

    Args:
        rows: row i has the entries 0 to i.
    """
    entries = [value for row in rows for value in row]
    least, largest = min(entries), max(entries)
    width = largest - least or 1.0
    lines = []
    for index, row in enumerate(rows):
        shades = [_SHADES[round((v - least) / width * (len(_SHADES) - 1))] * 2 for v in row]
        beside = f"  {row[-2]:.4f}" if len(row) > 1 else ""
        lines.append(f"{index:4d} |{''.join(shades)}|{beside}")
    return "\n".join([*lines, f"blank {least:.4f}, {_SHADES[-1]} {largest:.4f}"])
