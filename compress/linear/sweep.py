"""The optimal-brain-surgeon sweep that SparseGPT and GPTQ share.

Columns of a weight are rounded (to zero, to a grid) one after the other, and the error of each is
spread over the columns not yet visited so that the layer's output on the calibration inputs changes
least: Frantar & Alistarh 2023 (SparseGPT, Algorithm 1), Frantar et al. 2023 (GPTQ, Algorithm 1).
"""

from __future__ import annotations

from typing import Protocol

import torch

from compress.linear.pattern import Pattern

# Columns between which errors are spread one by one; between more of them by products.
_FEW = 8


class Rounding(Protocol):
    """How the sweep rounds; all matrices are transposed, [columns, rows].

    Attributes:
        together: columns that a rule looks at when it comes to the first of them; 1: none but that.
    """

    together: int

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
        block_size: columns between two updates of everything to the right (lazy batching), a
            multiple of what ``rounding`` looks at together. Inside a block the same is done by
            halves, so that most of the work is matrix products.

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
        part = _Block(start, block, factor, diagonal.tolist(), torch.empty_like(block), rounding)
        part.sweep(0, stop - start)
        if stop < columns:
            current[stop:].addmm_(upper[start:stop, stop:].t(), part.errors, alpha=-1)
    return current.t().contiguous()


class _Block:
    """Columns of the matrix from ``start`` on, as the sweep comes to them.

    Args:
        values: of the columns; becomes what they are rounded to.
        factor: U of these columns. scales: its diagonal.
        errors: for what is lost in each column, over its scale.
    """

    def __init__(
        self,
        start: int,
        values: torch.Tensor,
        factor: torch.Tensor,
        scales: list[float],
        errors: torch.Tensor,
        rounding: Rounding,
    ) -> None:
        self.start, self.values, self.factor, self.scales = start, values, factor, scales
        self.errors, self.rounding = errors, rounding
        self._columns, self._lost = values.unbind(), errors.unbind()

    def sweep(self, first: int, end: int) -> None:
        """Round columns first..end and spread their errors among them."""
        values, factor = self.values, self.factor
        if end - first > _FEW:
            middle = first + self._half(end - first)
            self.sweep(first, middle)
            spread = factor[first:middle, middle:end].t()
            values[middle:end].addmm_(spread, self.errors[first:middle], alpha=-1)
            self.sweep(middle, end)
            return
        for i in range(first, end):
            value = self._columns[i]
            rounded = self.rounding.column(self.start + i, value, values)
            error = torch.sub(value, rounded, out=self._lost[i]).div_(self.scales[i])
            if i + 1 < end:
                values[i + 1 : end].addr_(factor[i, i + 1 : end], error, alpha=-1)
            value.copy_(rounded)

    def _half(self, count: int) -> int:
        """Half of so many columns, which does not part those that are looked at together."""
        half, together = count // 2, self.rounding.together
        return half if count <= together else -(-half // together) * together


def sweep_bytes(shapes: list[tuple[int, int]], copies: int) -> int:
    """Memory that a sweep over matrices (out, in) of one input takes beyond them and their Gram
    matrix: its copies and factors while it is inverted, then ``copies`` of the matrices."""
    width, rows = shapes[0][1], sum(out for out, _ in shapes)
    return 4 * max(4 * width**2, 2 * width**2 + copies * rows * width)


def sweep_work(shapes: list[tuple[int, int]]) -> tuple[float, float]:
    """Multiply-accumulates of products that take as long as factor and sweep, and bytes that are
    written meanwhile."""
    width, rows = shapes[0][1], sum(out for out, _ in shapes)
    # Factors run at half the speed of products. Rounding a column and spreading its error takes
    # operations on so little that each counts as more than it writes: fitted to what was measured.
    return 1.5 * width**3 + rows * width * width / 2, 190.0 * rows * width


class Pruning:
    """SparseGPT's rounding: zeroes columns of several stacked matrices.

    Weights on features that were never active (``dead``) cost nothing: they go first, but no more
    of them than the sparsity asks for, since other texts may need them.

    Args:
        pattern: N:M, or None for unstructured zeros, ``share`` of them a block of columns.
        sizes: rows of each of the stacked matrices. dead: bool [columns].
        zeros: bool [rows, columns], weights that are zero and stay it; None for none. They count
            among the zeros that the sparsity asks for.
    """

    def __init__(
        self,
        pattern: Pattern | None,
        share: float,
        sizes: list[int],
        dead: torch.Tensor,
        zeros: torch.Tensor | None = None,
    ) -> None:
        self.pattern, self.share, self.sizes, self.dead = pattern, share, sizes, dead
        self.together = pattern.m if pattern else 1
        self.zeros = None if zeros is None else zeros.t().contiguous()

    def enter(self, start: int, stop: int, block: torch.Tensor, diagonal: torch.Tensor) -> None:
        self.start, self.diagonal = start, diagonal
        if self.pattern is not None:
            return
        # One threshold over all rows and columns of the block, for each matrix by itself.
        score = self._score(start, block, diagonal)
        masks = []
        for part in score.split(self.sizes, dim=1):
            drop = int(self.share * part.numel())
            if drop == 0:
                masks.append(torch.ones_like(part, dtype=torch.bool))
                continue
            flat = part.reshape(-1)
            lowest = flat.topk(drop, largest=False, sorted=False).indices
            keep = torch.ones_like(flat, dtype=torch.bool).index_fill_(0, lowest, False)
            masks.append(keep.reshape(part.shape))
        self.mask = torch.cat(masks, dim=1)
        if self.zeros is not None:
            self.mask &= ~self.zeros[start:stop]

    def column(self, index: int, value: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
        i = index - self.start
        if self.pattern is None:
            return value * self.mask[i]
        group = self.pattern.m
        if i % group == 0:
            # N:M masks are chosen when their group is reached, on the weights as updated so far.
            score = self._score(index, block[i : i + group], self.diagonal[i : i + group])
            self.mask = self.pattern.mask_of_group(score)
            if self.zeros is not None:
                self.mask = self.mask & ~self.zeros[index : index + group]
        return value * self.mask[i % group]

    def _score(self, start: int, block: torch.Tensor, diagonal: torch.Tensor) -> torch.Tensor:
        """What it costs to zero each weight of the columns from ``start`` on."""
        score = (block / diagonal[:, None]).square()
        score[self.dead[start : start + len(block)]] = 0
        if self.zeros is not None:
            score.masked_fill_(self.zeros[start : start + len(block)], -1)
        return score
