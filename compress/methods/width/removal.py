"""What the removal of units does to a pattern of zeros."""

from __future__ import annotations

import math

import torch

from compress.errors import CompressError
from compress.linear.layer import reading, writing
from compress.linear.quantized import scheme_of
from compress.methods.work import SiteWork
from compress.models.units import units_of_rows


def pattern_chunk(work: SiteWork, name: str, kept: int, columns: torch.Tensor) -> int:
    """Units that must go together so that a pattern of zeros in the output projection survives.

    Raises:
        CompressError: the pattern does not fit the width.
    """
    module = work.linear(name)
    linears = [work.linear(n) for n in units_of_rows(work.anatomy, work.site.kind)]
    if any(scheme_of(m) for m in (reading(module), *map(writing, linears))):
        raise CompressError(
            "layers in floating point",
            f"{work.anatomy.path}, whose layers an earlier step has quantised",
            "Put the width step before the quantisation",
        )
    pattern = getattr(reading(module), "zeros", None) or ""
    group = int(pattern.partition(":")[2] or 1)
    units, size = columns.shape
    chunk = group // math.gcd(group, size)
    if units % chunk or kept % chunk:
        raise CompressError(
            f"widths that are multiples of {chunk}, so that the {pattern} zeros of "
            f"{work.label(name)} keep their pattern",
            f"{kept} of {units}",
            f"Set round_to to a multiple of {chunk}, or put the width before the sparsity step",
        )
    return chunk
