"""Which neighbouring blocks can take over one another's work: those of one build."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from compress.errors import CompressError
from compress.models.anatomy import BlockAnatomy
from compress.models.outline import BlockOutline


def build_of(block: BlockAnatomy) -> tuple[Any, ...]:
    """What is equal in blocks whose weights mean the same: sizes, sites, layer type."""
    sites = [(site.kind, site.linears, site.norm) for site in block.sites]
    return block.widths, block.head_dim, block.hidden, sites, block.others, block.variant


def alike_runs(blocks: Sequence[BlockAnatomy], chosen: Iterable[int]) -> list[list[int]]:
    """Indices of neighbouring blocks of one build, out of the ``chosen`` ones (ascending)."""
    runs: list[list[int]] = []
    for index in chosen:
        neighbour = bool(runs) and runs[-1][-1] == index - 1
        if neighbour and build_of(blocks[index]) == build_of(blocks[index - 1]):
            runs[-1].append(index)
        else:
            runs.append([index])
    return runs


def check_plain(method: str, blocks: Iterable[BlockOutline]) -> None:
    """Refuse blocks that an earlier step has left other than dense.

    Raises:
        CompressError: a layer in the place of a linear, a grid, or zeros.
    """
    for block in blocks:
        for name, linear in block.linears.items():
            if linear.layer or linear.quantized or linear.density < 1:
                raise CompressError(
                    "plain linears without zeros or rounding of an earlier step",
                    f"another in {block.anatomy.path}.{name}",
                    f"Put {method} before that step",
                )
