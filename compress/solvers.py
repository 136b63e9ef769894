"""The optimal-brain-surgeon sweep that SparseGPT and GPTQ share.

Columns of a weight are rounded (to zero, to a grid) one after the other, and the error of each is
spread over the columns not yet visited so that the layer's output on the calibration inputs changes
least: Frantar & Alistarh 2023 (SparseGPT, Algorithm 1), Frantar et al. 2023 (GPTQ, Algorithm 1).
"""

from __future__ import annotations

from typing import Protocol

import torch


class Rounding(Protocol):
    """How the sweep rounds; all matrices are transposed, [columns, rows]."""

    def enter(self, start: int, stop: int, block: torch.Tensor, diagonal: torch.Tensor) -> None:
        """Called before columns start..stop, with their current values and diag(U) there."""

    def column(self, index: int, value: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
        """Return the rounded column ``index`` [rows]; ``block`` holds the current values from
        ``start`` on, for rules that look ahead (N:M groups)."""


def sweep(
    weight: torch.Tensor, upper: torch.Tensor, rounding: Rounding, block_size: int = 128
) -> torch.Tensor:
    """Round a weight column by column with error feedback.

    Args:
        weight: [rows, columns]; not changed.
        upper: U [columns, columns], the upper Cholesky factor of the inverse damped Gram matrix.
        rounding: the rule.
        block_size: columns between two updates of everything to the right (lazy batching).

    Returns:
        The rounded weight [rows, columns].
    """
    # Transposed, a column is contiguous, and the rank-one updates run at memory speed.
    current = weight.t().contiguous()
    columns = current.shape[0]
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        block = current[start:stop]
        factor = upper[start:stop, start:stop]
        diagonal = factor.diagonal()
        rounding.enter(start, stop, block, diagonal)
        errors = torch.empty_like(block)
        scales = diagonal.tolist()
        for i in range(stop - start):
            value = block[i]
            rounded = rounding.column(start + i, value, block)
            error = torch.sub(value, rounded, out=errors[i]).div_(scales[i])
            if i + 1 < stop - start:
                block[i + 1 :].addr_(factor[i, i + 1 :], error, alpha=-1)
            block[i] = rounded
        if stop < columns:
            current[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1)
    return current.t().contiguous()
