"""What methods may know about the inputs of a linear: moments and the Gram matrix."""

from __future__ import annotations

import torch

NOTHING, MOMENTS, GRAM = "nothing", "moments", "gram"

# Above this width the Gram matrix is built from column panels of its upper triangle only, which
# saves up to half of the multiplications; below it one full product is faster.
_PANEL = 128


class InputStatistics:
    """Sums over the rows of all inputs seen: count, squares, absolute values and, if asked, X^T X.

    Args:
        width: number of input features.
        kind: ``moments`` or ``gram`` (moments and the Gram matrix [width, width]).
        device: where the sums live.
    """

    def __init__(self, width: int, kind: str, device: torch.device | str = "cpu") -> None:
        self.width, self.kind, self.count = width, kind, 0
        self._gram = torch.zeros(width, width, device=device) if kind == GRAM else None
        self._square = torch.zeros(width, device=device)
        self._absolute = torch.zeros(width, device=device)

    def update(self, x: torch.Tensor) -> None:
        """Add inputs ``x`` [..., width]."""
        rows = x.detach().reshape(-1, self.width)
        self.count += rows.shape[0]
        if self._gram is None:
            rows = rows.float()
            self._square += rows.square().sum(0)
            self._absolute += rows.abs().sum(0)
            return
        if rows.is_cuda and rows.dtype != torch.float32:
            self._gram += torch.mm(rows.t(), rows, out_dtype=torch.float32)
            return
        # On a CPU a product of 16-bit matrices is rounded to 16 bits. That noise is larger than the
        # damping that makes a Gram matrix of correlated inputs definite, so it is done in float32.
        rows = rows.float()
        if rows.is_cuda or self.width < 2 * _PANEL:
            self._gram.addmm_(rows.t(), rows)
        else:
            for start in range(0, self.width, _PANEL):
                stop = min(start + _PANEL, self.width)
                self._gram[:stop, start:stop].addmm_(rows[:, :stop].t(), rows[:, start:stop])

    @property
    def gram(self) -> torch.Tensor:
        """X^T X, symmetric [width, width] (not divided by the count)."""
        if self._gram is None:
            raise ValueError("these statistics were collected without the Gram matrix")
        whole = torch.triu(self._gram)
        whole += torch.triu(self._gram, 1).t()
        return whole

    @property
    def norm(self) -> torch.Tensor:
        """Root mean square of each feature [width]."""
        square = self._square if self._gram is None else self._gram.diagonal()
        return (square / max(self.count, 1)).sqrt()

    @property
    def mean_absolute(self) -> torch.Tensor:
        """Mean absolute value of each feature [width] (moments only)."""
        return self._absolute / max(self.count, 1)

    def through(self, weight: torch.Tensor) -> InputStatistics:
        """Statistics of x W^T from those of x (needs the Gram matrix); weight [out, width]."""
        carried = InputStatistics(weight.shape[0], GRAM, weight.device)
        carried._gram, carried.count = weight @ self.gram @ weight.t(), self.count
        return carried

    def keep(self, columns: torch.Tensor) -> None:
        """Forget all features but ``columns``."""
        self.width = len(columns)
        self._square, self._absolute = self._square[columns], self._absolute[columns]
        if self._gram is not None:
            self._gram = self.gram[columns][:, columns]
