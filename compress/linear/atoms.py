"""The atoms of a dictionary in a metric, and the products that sparse coding takes with them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from compress.linear.algebra import cholesky

_TINY = 1e-6
_FLOOR = 1e-6  # energies of (nearly) nothing are not blown up to one: share of the mean


class Atoms:
    """H = E G E^T [N, N]: products of the atoms, at unit energy, with each other in a metric.

    E [N, n] holds the atoms as its rows. It is block-diagonal, r atoms in R^b a block of inputs,
    so that x H by way of E, G and E^T takes n^2 + 2 N b multiply-accumulates a row where H takes
    N^2, a quarter with two atoms an input; likewise its inverse. With few atoms H is formed.

    Args:
        dictionary: [B, r, b].
        metric: G [n, n], positive semi-definite, n = B b.

    Attributes:
        scale: [N], what each atom was multiplied with.
    """

    def __init__(self, dictionary: torch.Tensor, metric: torch.Tensor) -> None:
        blocks, _, width = dictionary.shape
        own = metric.view(blocks, width, blocks, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        energy = (torch.bmm(dictionary, own) * dictionary).sum(2)
        floor = _FLOOR * energy.mean().clamp_min(1e-30)
        scale = energy.clamp_min(floor).rsqrt()
        self.scale = scale.flatten()
        self.metric = metric
        self.pieces = dictionary * scale[..., None]
        self._factored = factored(*dictionary.shape)
        self._formed: torch.Tensor | None = None
        self._inverse_metric: torch.Tensor | None = None

    def changed(self, dictionary: torch.Tensor) -> Atoms:
        """Another dictionary in the same metric, whose inverse is not computed again."""
        made = Atoms(dictionary, self.metric)
        made._inverse_metric = self._inverse_metric
        return made

    def answers(self, rows: torch.Tensor) -> torch.Tensor:
        """Products [m, N] of rows [m, n] with the atoms, in the metric."""
        return self._folded(rows @ self.metric)

    def times(self, coefficients: torch.Tensor) -> torch.Tensor:
        """x H, [m, N]."""
        if self._factored:
            return self.answers(self._spread(coefficients))
        return coefficients @ self.matrix()

    def matrix(self) -> torch.Tensor:
        """H [N, N] itself."""
        if self._formed is None:
            pieces = self.pieces
            blocks, rank, width = pieces.shape
            half = torch.bmm(pieces, self.metric.view(blocks, width, -1))
            half = half.view(blocks * rank, blocks, width)
            made = torch.bmm(half.transpose(0, 1), pieces.transpose(1, 2))
            made = made.transpose(0, 1).reshape(blocks * rank, -1)
            self._formed = (made + made.t()) / 2
        return self._formed

    def shifted_inverse(self, shift: float) -> Callable[[torch.Tensor], torch.Tensor]:
        """x -> x (H + shift I)^-1.

        By way of the inputs: (H + p)^-1 = (1 - E (p G^-1 + E^T E)^-1 E^T) / p (Woodbury).
        """
        if not self._factored:
            dense = _inverse(self.matrix(), shift)
            return lambda x: x @ dense
        if self._inverse_metric is None:
            wide = self.metric.double()
            wide.diagonal().add_(_TINY * wide.diagonal().mean())
            inverse = torch.cholesky_inverse(cholesky(wide, "the inputs of a dictionary"))
            self._inverse_metric = inverse.to(self.metric.dtype)
        inner = shift * self._inverse_metric
        blocks, _, width = self.pieces.shape
        own = inner.view(blocks, width, blocks, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        own += torch.bmm(self.pieces.transpose(1, 2), self.pieces)
        middle = _inverse(inner, 0.0)

        def apply(x: torch.Tensor) -> torch.Tensor:
            return (x - self._folded(self._spread(x) @ middle)).div_(shift)

        return apply

    def _spread(self, coefficients: torch.Tensor) -> torch.Tensor:
        """x E, [m, n]."""
        return product(coefficients, self.pieces)

    def _folded(self, rows: torch.Tensor) -> torch.Tensor:
        """y E^T, [m, N]."""
        return product(rows, self.pieces.transpose(1, 2))


def product(coefficients: torch.Tensor, pieces: torch.Tensor) -> torch.Tensor:
    """[m, B r] times a block-diagonal matrix of pieces [B, r, b]: [m, B b]."""
    blocks, rank, _ = pieces.shape
    made = torch.bmm(coefficients.view(-1, blocks, rank).transpose(0, 1), pieces)
    return made.transpose(0, 1).flatten(1)


def factored(blocks: int, rank: int, width: int) -> bool:
    """Whether products by way of the inputs take less work than with H."""
    return row_work(blocks, rank, width) < (blocks * rank) ** 2


def row_work(blocks: int, rank: int, width: int) -> int:
    """Multiply-accumulates of a row of coefficients times H."""
    atoms, inputs = blocks * rank, blocks * width
    return min(atoms**2, inputs**2 + 2 * atoms * width)


def _inverse(matrix: torch.Tensor, shift: float) -> torch.Tensor:
    shifted = matrix.clone()
    shifted.diagonal().add_(shift)
    return torch.cholesky_inverse(torch.linalg.cholesky(shifted))
