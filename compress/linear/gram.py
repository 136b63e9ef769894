"""Gram matrices X^T X of inputs [rows, width], summed in float32 whatever the inputs are in."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from compress.linear.mkl import add_product, sums_bfloat16

# From 1.5 times a panel's width on the matrix is built from column panels of its upper triangle
# only, which saves up to half of the multiplications; below it one full product is faster. Where
# products are fast their panels are wider.
_PANEL, _FAST_PANEL = 128, 512


def add_gram(total: torch.Tensor, rows: torch.Tensor) -> None:
    """Add X^T X to ``total`` [width, width], float32; only its upper triangle is sure to be."""
    width, device = rows.shape[1], rows.device.type
    if device == "cuda" and rows.dtype != torch.float32:
        total += torch.mm(rows.t(), rows, out_dtype=torch.float32)
    elif device == "cpu" and is_fast(rows.dtype):
        rows = rows.contiguous()
        for start, stop in _panels(width, _FAST_PANEL):
            add_product(total[:stop, start:stop], rows[:, :stop], rows[:, start:stop])
    else:
        # torch rounds a product of 16-bit matrices to 16 bits on a CPU. That noise is larger than
        # the damping that makes a Gram matrix of correlated inputs definite.
        rows = rows.float()
        for start, stop in _panels(width, _PANEL) if device == "cpu" else [(0, width)]:
            total[:stop, start:stop].addmm_(rows[:, :stop].t(), rows[:, start:stop])


def is_fast(dtype: torch.dtype) -> bool:
    """Whether on a CPU a Gram matrix of ``dtype`` takes products of that type, not of float32."""
    return dtype == torch.bfloat16 and sums_bfloat16()


def gram_products(width: int, dtype: torch.dtype = torch.float32) -> float:
    """Multiply-accumulates a row of inputs that a Gram matrix takes on a CPU."""
    panel = _FAST_PANEL if is_fast(dtype) else _PANEL
    return float(sum((stop - start) * stop for start, stop in _panels(width, panel)))


def _panels(width: int, panel: int) -> Iterator[tuple[int, int]]:
    """First and last column, the last one excluded, of each panel."""
    if 2 * width < 3 * panel:
        yield 0, width
        return
    for start in range(0, width, panel):
        yield start, min(start + panel, width)
