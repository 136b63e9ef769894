"""Dense-sparse layers while their supports learn: gradients pass straight through the choice.

W^T = D S as in :class:`compress.linear.dense_sparse.DenseSparseLinear`. Tensors have the block
first: atoms [B, r, b], coefficients [B, out, r].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from compress.linear.algebra import solve_masked
from compress.linear.dense_sparse import DenseSparseLinear
from compress.linear.sparse_coding import largest

_RIDGE = 1e-6  # of least squares, as a share of the mean of the diagonal
_DESCENT = 4  # iterations of least squares on a new support


class Factors(nn.Module, ABC):
    """Stands in the place of a layer while its factors and their support learn.

    Args:
        inner: the layer; its tensors change in :meth:`settle` only, but its bias may learn.

    Attributes:
        support: bool [B, out, r], true at exactly k atoms of each block for every output.
        free: whether the support may change.
    """

    support: torch.Tensor
    free: bool = True

    def __init__(self, inner: DenseSparseLinear) -> None:
        super().__init__()
        self.inner = inner.requires_grad_(False)

    @abstractmethod
    def learned(self) -> list[nn.Parameter]:
        """What an optimiser changes."""

    @abstractmethod
    def held(self) -> dict[str, torch.Tensor]:
        """What :meth:`choose` and :meth:`follow` change in place, by name."""

    @abstractmethod
    def choose(self) -> None:
        """Choose the support anew, while it is free."""

    def follow(self) -> None:
        """Between two choices, once a step."""

    @abstractmethod
    def weight(self) -> torch.Tensor:
        """The product [out, in]; gradients reach what learns."""

    @abstractmethod
    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Atoms and coefficients as they are, the latter zero off the support."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        # The product in float32 wherever the rest is computed in 16 bits: it is rounded once.
        with torch.autocast(inputs.device.type, enabled=False):
            weight = self.weight()
        return functional.linear(inputs, weight, self.inner.bias)

    @torch.no_grad()
    def settle(self) -> DenseSparseLinear:
        """The layer, with what was learned."""
        inner = self.inner
        atoms, coefficients = self.factors()
        indices = self.support.nonzero()[:, 2].view(inner.blocks, inner.out_features, -1)
        values = coefficients.gather(2, indices).transpose(0, 1)
        inner.dictionary.weight.copy_(atoms.reshape(inner.dictionary.weight.shape))
        inner.values.weight.copy_(values.reshape(inner.values.weight.shape))
        flat = indices.transpose(0, 1).reshape(inner.indices.shape)
        inner.indices.copy_(flat.to(inner.indices.dtype))
        return inner


class LatentFactors(Factors):
    """Dictionary and a dense latent matrix learn; the support is where the latent is largest.

    What is off the support gets the gradient that it would have on it, and comes in once it has
    grown beyond what is there (the straight-through estimator, as in top-k training).
    """

    def __init__(self, inner: DenseSparseLinear) -> None:
        super().__init__(inner)
        atoms, coefficients, support = unpacked(inner)
        self.atoms, self.latent = nn.Parameter(atoms), nn.Parameter(coefficients)
        self.register_buffer("support", support)

    def learned(self) -> list[nn.Parameter]:
        return [self.atoms, self.latent]

    def held(self) -> dict[str, torch.Tensor]:
        return {"support": self.support}

    @torch.no_grad()
    def choose(self) -> None:
        if self.free:
            # Atoms are of unequal length while they learn: what counts is how much a term adds.
            scores = self.latent.abs() * self.atoms.norm(dim=2)[:, None]
            self.support.copy_(_largest(scores, self.inner.nonzeros))

    def weight(self) -> torch.Tensor:
        if not self.free:
            return _product(self.latent * self.support, self.atoms)
        sparse: Any = _StraightThrough.apply(self.latent, self.support)
        return _product(sparse, self.atoms)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.atoms, self.latent * self.support


class ProxyFactors(Factors):
    """A dense matrix V learns; what is computed with is its factorisation, which follows it.

    The gradient with respect to the product is taken for that with respect to V. A factorisation
    starts from the last one: a choice is a step of iterative hard thresholding (Blumensath & Davies
    2009), least squares on the support that it gives, and the best dictionary for these
    coefficients; between two choices the coefficients descend on their support. V starts as the
    product, of which the first choice finds the factors that it is made of.
    """

    atoms: torch.Tensor
    coefficients: torch.Tensor
    rates: torch.Tensor

    def __init__(self, inner: DenseSparseLinear) -> None:
        super().__init__(inner)
        atoms, coefficients, support = unpacked(inner)
        self.proxy = nn.Parameter(_product(coefficients, atoms))
        self.register_buffer("atoms", atoms)
        self.register_buffer("coefficients", coefficients)
        self.register_buffer("support", support)
        self.register_buffer("rates", atoms.new_zeros(len(atoms), 1, 1))

    def learned(self) -> list[nn.Parameter]:
        return [self.proxy]

    def held(self) -> dict[str, torch.Tensor]:
        return {
            "support": self.support, "atoms": self.atoms, "coefficients": self.coefficients,
            "rates": self.rates,
        }  # fmt: skip

    @torch.no_grad()
    def choose(self) -> None:
        wanted = self._pieces()
        # One over the largest eigenvalue of D^T D: a step that no error grows in.
        self.rates.copy_(
            torch.linalg.matrix_norm(self.atoms, 2).square().reciprocal()[:, None, None]
        )
        moved = self.coefficients + self.rates * self._pull(wanted)
        if self.free:
            scores = moved.abs() * self.atoms.norm(dim=2)[:, None]
            self.support.copy_(_largest(scores, self.inner.nonzeros))
        for block, atoms in enumerate(self.atoms):
            mask = self.support[block]
            targets, gram = wanted[block] @ atoms.t(), atoms @ atoms.t()
            coded = solve_masked(moved[block] * mask, targets, gram, mask, _RIDGE, _DESCENT)
            self.coefficients[block] = coded
            self.atoms[block] = _best_atoms(wanted[block], coded, atoms)

    @torch.no_grad()
    def follow(self) -> None:
        self.coefficients += self.rates * self._pull(self._pieces()) * self.support

    def weight(self) -> torch.Tensor:
        # V - V is exactly nothing, with the gradient of V.
        return _product(self.coefficients, self.atoms) + (self.proxy - self.proxy.detach())

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.atoms, self.coefficients

    def _pieces(self) -> torch.Tensor:
        """V [B, out, b]."""
        return self.proxy.view(len(self.proxy), len(self.atoms), -1).transpose(0, 1)

    def _pull(self, wanted: torch.Tensor) -> torch.Tensor:
        """What is left of V, by atoms: minus the gradient of half the squared error."""
        left = wanted - torch.bmm(self.coefficients, self.atoms)
        return torch.bmm(left, self.atoms.transpose(1, 2))


MODES: dict[str, type[Factors]] = {"latent": LatentFactors, "proxy": ProxyFactors}


def unpacked(layer: DenseSparseLinear) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Atoms, coefficients and support of a layer, at scales at which both factors have the same
    root mean square, so that one learning rate suits both."""
    blocks, rank = layer.blocks, layer.rank
    places = layer.indices.long().view(-1, blocks, layer.nonzeros).transpose(0, 1)
    values = layer.values.weight.detach().float().view(-1, blocks, layer.nonzeros).transpose(0, 1)
    atoms = layer.dictionary.weight.detach().float().view(blocks, rank, -1)
    scale = (_mean_square(values) / _mean_square(atoms).clamp_min(1e-30)) ** 0.25
    scale = scale if bool(scale > 0) else torch.ones_like(scale)
    shape = blocks, layer.out_features, rank
    coefficients = values.new_zeros(shape).scatter_(2, places, values / scale)
    support = torch.zeros(shape, dtype=torch.bool, device=values.device)
    return atoms * scale, coefficients, support.scatter_(2, places, True)


class _StraightThrough(torch.autograd.Function):
    """Zero off the support, with the gradient of what is not."""

    @staticmethod
    def forward(ctx: Any, latent: torch.Tensor, support: torch.Tensor) -> torch.Tensor:
        return latent * support

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


def _product(coefficients: torch.Tensor, atoms: torch.Tensor) -> torch.Tensor:
    """W [out, in]."""
    return torch.bmm(coefficients, atoms).transpose(0, 1).flatten(1)


def _largest(scores: torch.Tensor, nonzeros: int) -> torch.Tensor:
    """Mask of the ``nonzeros`` largest scores of each row of [B, out, r]."""
    return largest(scores.flatten(0, 1), 1, nonzeros).view_as(scores)


def _best_atoms(wanted: torch.Tensor, coded: torch.Tensor, atoms: torch.Tensor) -> torch.Tensor:
    """Least squares of ``wanted`` [out, b] by atoms for given coefficients; a ridge towards the
    atoms as they are keeps those that nobody takes."""
    wide = coded.double()
    squares = wide.t() @ wide
    squares.diagonal().add_(_RIDGE * squares.diagonal().mean() + 1e-30)
    left = wanted.double() - wide @ atoms.double()
    return (atoms + torch.linalg.solve(squares, wide.t() @ left)).to(atoms.dtype)


def _mean_square(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.square().mean()
