"""What a unit of a block (a neuron, a group of heads) is worth to the output of its block."""

from __future__ import annotations

import torch

from compress.calibrate.statistics import InputStatistics
from compress.linalg import cholesky, damped

ACTIVATION, RESIDUAL = "activation", "residual"


def activation_scores(
    weight: torch.Tensor, statistics: InputStatistics, columns: torch.Tensor
) -> torch.Tensor:
    """Energy that each unit sends through the output projection: ||W_u X_u||^2.

    For a neuron j that is ||W_:j||^2 sum x_j^2, Wanda's score summed over the outputs.

    Args:
        weight: W [out, n]. columns: [units, columns a unit].
        statistics: moments are enough for units of one column.

    Returns:
        [units].
    """
    if columns.shape[1] == 1:
        energy = statistics.norm.square() * statistics.count
        return (weight.square().sum(0) * energy)[columns[:, 0]]
    return _quadratic(weight, _blocks(statistics.gram, columns), columns)


def residual_scores(
    weight: torch.Tensor,
    statistics: InputStatistics,
    columns: torch.Tensor,
    damping: float,
    what: str,
) -> torch.Tensor:
    """Energy of the output that is lost with a unit after the best correction by all others.

    The optimal-brain-surgeon score of a set of columns (Hassibi & Stork 1993; Kurtic et al. 2023,
    arXiv 2302.04089): W_u ((G^-1)_uu)^-1 W_u^T, summed over the outputs.

    Returns:
        [units].
    """
    gram, dead = damped(statistics.gram.double(), damping)
    inverse = torch.cholesky_inverse(cholesky(gram, what))
    blocks = torch.linalg.inv(_blocks(inverse, columns))
    alive = weight.double().masked_fill(dead, 0.0)
    return _quadratic(alive, blocks, columns).float()


def _blocks(gram: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Diagonal blocks of a matrix [n, n] for the units' columns, [units, size, size]."""
    return gram[columns[:, :, None], columns[:, None, :]]


def _quadratic(weight: torch.Tensor, blocks: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """sum over outputs of w_u B_u w_u^T for each unit u; [units]."""
    parts = weight[:, columns].permute(1, 0, 2)  # [units, out, size]
    return ((parts @ blocks) * parts).sum((1, 2))
