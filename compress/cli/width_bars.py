"""What blocks of unequal width have left, as bars that any terminal and any file can show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_LENGTH = 24
_PARTS = (("attention", "kv_heads", "KV heads"), ("ffn", "ffn", "neurons"))


def uneven(blocks: Sequence[dict[str, Any]]) -> bool:
    """Whether there is anything to draw: blocks that differ, or that have lost a sub-layer."""
    widths = {tuple(block[key] for _, key, _ in _PARTS) for block in blocks}
    return len(widths) > 1 or any(block["absent"] for block in blocks)


def width_bars(blocks: Sequence[dict[str, Any]]) -> str:
    """A line a block: key/value heads and neurons, each as a number and a bar.

    The widest block's bar is full; a sub-layer that is gone has none.

    Args:
        blocks: as :func:`compress.planning.inspection.inspect_model` describes them.
    """
    widest = {key: max(block[key] for block in blocks) or 1 for _, key, _ in _PARTS}
    lines = ["     " + "  ".join(f"{title:<{_LENGTH + 8}}" for _, _, title in _PARTS).rstrip()]
    for index, block in enumerate(blocks):
        cells = []
        for part, key, _ in _PARTS:
            count = 0 if part in block["absent"] else block[key]
            bar = "#" * round(_LENGTH * count / widest[key]) or ("." if count else "")
            cells.append(f"{count or 'gone':>6} |{bar:<{_LENGTH}}|"[: _LENGTH + 10])
        lines.append(f"{index:4d} " + " ".join(cells))
    return "\n".join(lines)
