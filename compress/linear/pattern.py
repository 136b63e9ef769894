"""N:M sparsity patterns: N weights stay in every M consecutive ones along the input dimension."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from compress.errors import CompressError

UNSTRUCTURED = "unstructured"

# Masks are made a few million weights at a time: indices take eight bytes a weight.
_PIECE = 2**22


def row_pieces(rows: int, columns: int) -> Iterator[slice]:
    """Cut the rows of a matrix [rows, columns] into pieces that need little scratch memory."""
    step = max(1, _PIECE // max(columns, 1))
    for start in range(0, rows, step):
        yield slice(start, start + step)


@dataclass(frozen=True)
class Pattern:
    """N of every M weights are kept (in Wanda's code ``prune_n`` is the number zeroed)."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n <= self.m:
            raise CompressError("a pattern N:M with 0 < N <= M, as in 2:4", f"{self.n}:{self.m}")

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read "2:4".

        Raises:
            CompressError: it is not two numbers N:M with 0 < N <= M.
        """
        match = re.fullmatch(r"(\d+):(\d+)", text)
        if not match:
            raise CompressError("a pattern N:M with 0 < N <= M, as in 2:4", repr(text))
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def candidates(self) -> int:
        """Number of legal masks of one group."""
        return math.comb(self.m, self.n)

    @property
    def sparsity(self) -> float:
        """Share of weights that become zero."""
        return 1 - self.n / self.m

    def mask(self, score: torch.Tensor) -> torch.Tensor:
        """Keep the N highest scores of every group.

        Args:
            score: [rows, columns], columns a multiple of M.

        Returns:
            Boolean mask, True = kept; exactly N a group even among ties.
        """
        mask = torch.empty(score.shape, dtype=torch.bool, device=score.device)
        for rows in row_pieces(*score.shape):
            groups = score[rows].unflatten(1, (-1, self.m))
            mask[rows] = self._best(groups, -1).flatten(1)
        return mask

    def mask_of_group(self, score: torch.Tensor) -> torch.Tensor:
        """As :meth:`mask`, of one group of every row, transposed: score [M, rows]."""
        return self._best(score, 0)

    def _best(self, score: torch.Tensor, dim: int) -> torch.Tensor:
        """True at the N highest scores along a dimension of length M."""
        best = score.topk(self.n, dim=dim, sorted=False).indices
        return torch.zeros_like(score, dtype=torch.bool).scatter_(dim, best, True)
