"""What a unit of a block (a neuron, a group of heads) is worth to the output of its block."""

from __future__ import annotations

import torch

from compress.linear.algebra import cholesky, damped
from compress.linear.statistics import InputStatistics

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

    The optimal-brain-surgeon score of a set of columns (Kurtic et al. 2023, arXiv 2302.04089):
    W_u ((G^-1)_uu)^-1 W_u^T, summed over the outputs.

    Args:
        weight: W [out, n]. columns: [units, columns a unit].
        damping: ridge as a share of the mean of the diagonal of G.

    Returns:
        [units].
    """
    weight, inverse = _surgeon(weight, statistics, damping, what)
    return _losses(weight, inverse, columns).float()


def residual_selection(
    weight: torch.Tensor,
    statistics: InputStatistics,
    columns: torch.Tensor,
    kept: int,
    damping: float,
    what: str,
    rounds: int = 16,
) -> torch.Tensor:
    """Remove units one at a time by their residual scores, which change with every removal.

    Two units that can stand in for each other both look worthless until one of them is gone. That
    is ZipLM's algorithm, whose updates of the whole matrices after each unit are saved here: a
    round takes the units from a pool of those with the lowest scores, only the pool's columns
    follow each removal, and all others follow once at the end of the round.

    Args:
        kept: units that stay.
        rounds: number of pools; each holds twice as many units as the round removes.

    Returns:
        Indices of the units that stay, ascending.
    """
    weight, inverse = _surgeon(weight, statistics, damping, what)
    left = torch.arange(len(columns), device=columns.device)
    for remaining in range(rounds, 0, -1):
        drop = -(-(len(left) - kept) // remaining)
        if drop <= 0:
            continue
        lowest = _losses(weight, inverse, columns[left]).argsort(stable=True)[: 2 * drop]
        pool = left[lowest]
        gone = pool[_worst_of_pool(weight, inverse, columns[pool], drop)]
        _eliminate(weight, inverse, columns[gone].reshape(-1))
        left = left[~torch.isin(left, gone)]
    return left


def _worst_of_pool(
    weight: torch.Tensor, inverse: torch.Tensor, columns: torch.Tensor, drop: int
) -> torch.Tensor:
    """Positions in the pool [units, columns a unit] of the units that go."""
    flat = columns.reshape(-1)
    weight, inverse = weight[:, flat].clone(), inverse[flat][:, flat].clone()
    local = torch.arange(len(flat), device=flat.device).reshape(columns.shape)
    alive = torch.arange(len(columns), device=flat.device)
    gone = []
    for _ in range(drop):
        worst = _losses(weight, inverse, local[alive]).argmin()
        unit = alive[worst]
        _eliminate(weight, inverse, local[unit])
        gone.append(unit)
        alive = alive[alive != unit]
    return torch.stack(gone)


def _eliminate(weight: torch.Tensor, inverse: torch.Tensor, gone: torch.Tensor) -> None:
    """Remove columns: correct the weight for them, and take them out of the inverse, in place."""
    update = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
    weight -= weight[:, gone] @ update
    inverse -= inverse[:, gone] @ update


def _surgeon(
    weight: torch.Tensor, statistics: InputStatistics, damping: float, what: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight without dead columns, and the inverse of the damped Gram matrix, both float64."""
    gram, dead = damped(statistics.gram.double(), damping)
    return weight.double().masked_fill(dead, 0.0), torch.cholesky_inverse(cholesky(gram, what))


def _losses(weight: torch.Tensor, inverse: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    if columns.shape[1] == 1:
        flat = columns[:, 0]
        return weight.square().sum(0)[flat] / inverse.diagonal()[flat]
    return _quadratic(weight, torch.linalg.inv(_blocks(inverse, columns)), columns)


def _blocks(gram: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Diagonal blocks of a matrix [n, n] for the units' columns, [units, size, size]."""
    return gram[columns[:, :, None], columns[:, None, :]]


def _quadratic(weight: torch.Tensor, blocks: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """sum over outputs of w_u B_u w_u^T for each unit u; [units]."""
    parts = weight[:, columns].permute(1, 0, 2)  # [units, out, size]
    return ((parts @ blocks) * parts).sum((1, 2))
