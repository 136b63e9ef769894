"""Sparse coding under a metric: rows that are sums of few atoms, so many from each block of them.

All functions solve, for every row s of S by itself, min s H s^T - 2 c s^T with exactly k entries a
block that may differ from zero: H [N, N] are the products of the atoms (of unit energy) with each
other, c [N] those of the row's target with the atoms. The N atoms come in blocks of r. What the
target's own energy adds is the same for all s.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from compress.linear.atoms import Atoms, factored, row_work
from compress.linear.descent import descend

# (penalty, iterations) of the alternating directions, in units of the atoms' energy: a small one
# first, under which supports still change, then larger ones that bind them.
_FROM_NOTHING = ((0.03, 8), (0.1, 8), (0.3, 8), (1.0, 6))
_FROM_SUPPORT = ((0.3, 5),)
_RIDGE = 1e-6
_DESCENT = 4  # iterations on a support; the last round has more
_CHUNK_BYTES = 64 * 2**20
# Bytes that an iteration writes for each coefficient beside products; choosing the largest takes as
# long as most of them.
_WRITTEN = 110.0

Coder = Callable[[torch.Tensor, Atoms, int, int, torch.Tensor | None], torch.Tensor]


def coding_loss(coded: torch.Tensor, targets: torch.Tensor, atoms: Atoms) -> torch.Tensor:
    """s H s^T - 2 c s^T of each row, [rows]."""
    return ((atoms.times(coded) - 2 * targets) * coded).sum(1)


def largest(scores: torch.Tensor, blocks: int, nonzeros: int) -> torch.Tensor:
    """Mask [rows, N] of the ``nonzeros`` largest scores of each block."""
    view = scores.view(len(scores), blocks, -1)
    best = view.topk(nonzeros, dim=2, sorted=False).indices
    return torch.zeros_like(view, dtype=torch.bool).scatter_(2, best, True).view_as(scores)


def by_correlation(
    targets: torch.Tensor,
    atoms: Atoms,
    blocks: int,
    nonzeros: int,
    start: torch.Tensor | None = None,
) -> torch.Tensor:
    """The atoms that go best with the target each by itself, then least squares on them.

    Args:
        targets: c [rows, N]. start: not looked at.

    Returns:
        S [rows, N].
    """
    mask = largest(targets.abs(), blocks, nonzeros)
    return descended(torch.zeros_like(targets), targets, atoms, mask)


def by_pursuit(
    targets: torch.Tensor,
    atoms: Atoms,
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
    unit = atoms.matrix()
    pieces = [_pursue(part, unit, blocks, nonzeros) for part in targets.split(min(size, rows))]
    return descended(torch.zeros_like(targets), targets, atoms, torch.cat(pieces))


def _pursue(targets: torch.Tensor, unit: torch.Tensor, blocks: int, nonzeros: int) -> torch.Tensor:
    """Mask of the atoms that a pursuit chooses."""
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
    atoms: Atoms,
    blocks: int,
    nonzeros: int,
    start: torch.Tensor | None = None,
) -> torch.Tensor:
    """Alternating directions (Boyd et al. 2011, section 9.1): dense least squares and the nearest
    sparse matrix are drawn together, then least squares on the support.

    A few products of [rows, N] with the inverse whatever k is, and supports that a pursuit, which
    never takes an atom back, does not find once k is a tenth of r or more.

    Args:
        start: coefficients of much the same problem to begin with, whose support is nearly right.

    Others, Returns: as :func:`by_correlation`.
    """
    # With S the nearest sparse matrix and U the scaled dual: ``mirrored`` is S - U.
    mirrored = torch.zeros_like(targets) if start is None else start.clone()
    dual = torch.zeros_like(targets)
    mask, sparse, penalty = mirrored != 0, mirrored, 0.0
    for following, iterations in _FROM_NOTHING if start is None else _FROM_SUPPORT:
        if penalty:
            dual *= penalty / following
            mirrored = sparse - dual
        penalty = following
        solve = atoms.shifted_inverse(penalty)
        for _ in range(iterations):
            dual += solve(torch.add(targets, mirrored, alpha=penalty))
            mask = largest(dual.abs(), blocks, nonzeros)
            sparse = dual * mask
            dual -= sparse
            mirrored = torch.sub(sparse, dual, out=mirrored)
    return descended(sparse, targets, atoms, mask)


def descended(
    start: torch.Tensor,
    targets: torch.Tensor,
    atoms: Atoms,
    mask: torch.Tensor,
    iterations: int = _DESCENT,
) -> torch.Tensor:
    """Least squares on a support from ``start``, as far as that lies on it."""
    start = start * mask

    def product(rows: torch.Tensor) -> torch.Tensor:
        return atoms.times(rows).add_(rows, alpha=_RIDGE)

    return descend(start, targets - atoms.times(start), product, mask, iterations)


def coding_bytes(rows: int, blocks: int, rank: int, width: int, coding: str) -> int:
    """Bytes that a coder takes beyond its arguments and its result."""
    count, inputs = blocks * rank, blocks * width
    if coding == "pursuit" or not factored(blocks, rank, width):
        square = 16 * count**2 + 4 * count * inputs  # H, and what it or its inverse is made from
    else:
        square = 28 * inputs**2  # the inverse of the metric, which is found in float64
    return square + 40 * rows * count + _CHUNK_BYTES * (coding == "pursuit")


def coding_work(rows: int, blocks: int, rank: int, width: int, first: bool) -> tuple[float, float]:
    """Multiply-accumulates of :func:`by_directions`, with a start or (``first``) without, and the
    bytes that it writes beside products."""
    stages = _FROM_NOTHING if first else _FROM_SUPPORT
    iterations = sum(count for _, count in stages) + _DESCENT + 1
    inverted = blocks * min(rank, width)
    products = iterations * rows * row_work(blocks, rank, width)
    moved = _WRITTEN * iterations * rows * blocks * rank
    return products + 2.0 * len(stages) * inverted**3, moved


CODERS: dict[str, Coder] = {
    "directions": by_directions,
    "pursuit": by_pursuit,
    "correlation": by_correlation,
}
