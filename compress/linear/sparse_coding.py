"""Sparse coding under a metric: rows that are sums of few atoms, so many from each block of them.

All functions solve, for every row s of S by itself, min s H s^T - 2 c s^T with exactly k entries a
block that may differ from zero: H [N, N] are the products of the atoms with each other, c [N] those
of the row's target with the atoms. The N atoms come in blocks of r. What the target's own energy
adds is the same for all s.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from compress.linear.algebra import solve_masked

# (penalty, iterations) of the alternating directions, in units of the atoms' energy: a small one
# first, under which supports still change, then larger ones that bind them.
_FROM_NOTHING = ((0.03, 8), (0.1, 8), (0.3, 8), (1.0, 6))
_FROM_SUPPORT = ((0.3, 5),)
_RIDGE = 1e-6
_DESCENT = 4  # iterations on a support; the last round has more
_CHUNK_BYTES = 64 * 2**20

Coder = Callable[[torch.Tensor, torch.Tensor, int, int, torch.Tensor | None], torch.Tensor]


def coding_loss(coded: torch.Tensor, targets: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """s H s^T - 2 c s^T of each row, [rows]."""
    return ((coded @ gram - 2 * targets) * coded).sum(1)


def largest(scores: torch.Tensor, blocks: int, nonzeros: int) -> torch.Tensor:
    """Mask [rows, N] of the ``nonzeros`` largest scores of each block."""
    view = scores.view(len(scores), blocks, -1)
    best = view.topk(nonzeros, dim=2, sorted=False).indices
    return torch.zeros_like(view, dtype=torch.bool).scatter_(2, best, True).view_as(scores)


def by_correlation(
    targets: torch.Tensor,
    gram: torch.Tensor,
    blocks: int,
    nonzeros: int,
    start: torch.Tensor | None = None,
) -> torch.Tensor:
    """The atoms that go best with the target each by itself, then least squares on them.

    Args:
        targets: c [rows, N]. gram: H [N, N]. start: not looked at.

    Returns:
        S [rows, N].
    """
    scale = _unit_scale(gram)
    mask = largest((targets * scale).abs(), blocks, nonzeros)
    return _least_squares(torch.zeros_like(targets), targets, gram, mask)


def by_pursuit(
    targets: torch.Tensor,
    gram: torch.Tensor,
    blocks: int,
    nonzeros: int,
    start: torch.Tensor | None = None,
) -> torch.Tensor:
    """Batch orthogonal matching pursuit (Rubinstein et al. 2008), all rows together.

    An atom at a time: of the blocks that are not full, the one that goes best with what is left.
    The factor of each row's products of chosen atoms grows by a row; what is left is never formed,
    only its products with the atoms. Work grows with (B k)^2 N a row: for small B k.

    Args, Returns: as :func:`by_correlation`.
    """
    rows, count = targets.shape
    total = blocks * nonzeros
    size = max(1, _CHUNK_BYTES // (4 * count * (total + 3)))
    scale = _unit_scale(gram)
    unit = gram * scale * scale[:, None]
    pieces = [
        _pursue(part * scale, unit, blocks, nonzeros) for part in targets.split(min(size, rows))
    ]
    mask = torch.cat(pieces)
    return _least_squares(torch.zeros_like(targets), targets, gram, mask)


def _pursue(targets: torch.Tensor, unit: torch.Tensor, blocks: int, nonzeros: int) -> torch.Tensor:
    """Mask of the atoms that a pursuit chooses; products of atoms of unit energy."""
    rows, count = targets.shape
    left = targets.clone()
    mask = torch.zeros_like(targets, dtype=torch.bool)
    free = torch.ones_like(mask)
    taken = torch.zeros(rows, blocks, dtype=torch.int64, device=targets.device)
    # Products of all atoms with the chosen ones, made orthonormal one after the other.
    basis = targets.new_zeros(rows, blocks * nonzeros, count)
    every = torch.arange(rows, device=targets.device)
    for step in range(blocks * nonzeros):
        best = left.abs().masked_fill(~free, -1).argmax(1)
        mask[every, best] = True
        free[every, best] = False
        block = best // (count // blocks)
        taken[every, block] += 1
        full = every[taken[every, block] == nonzeros]
        free.view(rows, blocks, -1)[full, block[full]] = False
        before = basis[:, :step]
        weights = before[every, :, best]
        fresh = unit[best] - torch.bmm(weights[:, None], before)[:, 0]
        # The energy of the new atom outside the span of those before it; none: it adds nothing.
        energy = fresh[every, best]
        inverse = torch.where(energy > _RIDGE, energy.clamp_min(_RIDGE).rsqrt(), 0.0)
        fresh *= inverse[:, None]
        basis[:, step] = fresh
        gain = left[every, best] * inverse
        left -= gain[:, None] * fresh
    return mask


def by_directions(
    targets: torch.Tensor,
    gram: torch.Tensor,
    blocks: int,
    nonzeros: int,
    start: torch.Tensor | None = None,
) -> torch.Tensor:
    """Alternating directions (Boyd et al. 2011, section 9.1): dense least squares and the nearest
    sparse matrix are drawn together, then least squares on the support.

    A few products [rows, N] x [N, N] whatever k is, and supports that a pursuit, which never takes
    an atom back, does not find once k is a tenth of r or more.

    Args:
        start: coefficients of much the same problem to begin with, whose support is nearly right.

    Others, Returns: as :func:`by_correlation`.
    """
    scale = _unit_scale(gram)
    unit, aims = gram * scale * scale[:, None], targets * scale
    sparse = torch.zeros_like(targets) if start is None else start / scale
    dual = torch.zeros_like(targets)
    mask, penalty = sparse != 0, 0.0
    for following, iterations in _FROM_NOTHING if start is None else _FROM_SUPPORT:
        dual *= penalty / following
        penalty = following
        shifted = unit.clone()
        shifted.diagonal().add_(penalty)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(shifted))
        for _ in range(iterations):
            free = (aims + penalty * (sparse - dual)) @ inverse
            dual += free
            mask = largest(dual.abs(), blocks, nonzeros)
            sparse = dual * mask
            dual -= sparse
    return _least_squares(sparse * scale, targets, gram, mask)


def coding_bytes(rows: int, atoms: int) -> int:
    """Bytes that any of these takes beyond its arguments and its result."""
    return 4 * (4 * atoms**2 + 8 * rows * atoms) + _CHUNK_BYTES


def coding_work(rows: int, atoms: int, first: bool) -> float:
    """Multiply-accumulates of :func:`by_directions`, with a start or (``first``) without."""
    stages = _FROM_NOTHING if first else _FROM_SUPPORT
    iterations = sum(count for _, count in stages) + _DESCENT
    return iterations * rows * atoms**2 + 2.0 * len(stages) * atoms**3


def _least_squares(
    start: torch.Tensor, targets: torch.Tensor, gram: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    return solve_masked(start * mask, targets, gram, mask, _RIDGE, _DESCENT)


def _unit_scale(gram: torch.Tensor) -> torch.Tensor:
    """Factors that give all atoms the same energy; those of (nearly) none are not blown up."""
    energy = gram.diagonal()
    return energy.clamp_min(1e-6 * energy.mean().clamp_min(1e-30)).rsqrt()


CODERS: dict[str, Coder] = {
    "directions": by_directions,
    "pursuit": by_pursuit,
    "correlation": by_correlation,
}
