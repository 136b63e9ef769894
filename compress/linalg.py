"""Linear algebra that several methods share. Everything works on float32 matrices on one device."""

from __future__ import annotations

import torch

from compress.errors import CompressError


def damped(gram: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Add ``damping`` times the mean diagonal to a Gram matrix and revive dead features.

    Args:
        gram: [n, n], symmetric positive semi-definite.
        damping: fraction of the mean of the diagonal (0.01 in SparseGPT and GPTQ).

    Returns:
        The damped copy, and a boolean mask [n] of features that were never active.
    """
    out = gram.clone()
    diagonal = out.diagonal()
    dead = diagonal == 0
    mean = diagonal.mean()
    diagonal[dead] = mean if mean > 0 else 1.0
    diagonal += damping * (mean if mean > 0 else 1.0)
    return out, dead


def cholesky(matrix: torch.Tensor, what: str) -> torch.Tensor:
    """Lower Cholesky factor [n, n]; retries with growing damping before it gives up.

    Raises:
        CompressError: the matrix holds NaN or stays indefinite at 100 % damping.
    """
    if not torch.isfinite(matrix).all():
        raise CompressError(
            f"finite input statistics for {what}",
            "NaN or infinity",
            "The model overflows on the calibration text, or its weights are broken: check it with "
            "`compress evaluate` first",
        )
    scale = matrix.diagonal().mean()
    for extra in (0.0, 0.01, 0.1, 1.0):
        candidate = matrix if extra == 0 else matrix + extra * scale * _eye(matrix)
        factor, info = torch.linalg.cholesky_ex(candidate)
        if int(info) == 0:
            return factor
    raise CompressError(
        f"a positive definite Gram matrix for {what}",
        "one that is indefinite even with its whole mean diagonal added",
        "Give more calibration samples, or raise the step's damping",
    )


def inverse_cholesky(
    gram: torch.Tensor, damping: float, what: str = "a linear layer"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Upper triangular U with H^-1 = U^T U, H the damped Gram matrix (SparseGPT and GPTQ).

    Row i of U tells, up to scale, how an error in feature i is best spread over features > i. The
    factor is had without inverting H: with J the reversal of the order, J H J = M M^T gives
    H = R R^T for the upper triangular R = J M J, hence U = R^-1. One factorisation fewer than the
    papers' codes take, and no second one of an ill-conditioned inverse that can fail.

    Returns:
        U [n, n] and the mask of dead features [n].
    """
    hessian, dead = damped(gram, damping)
    factor = cholesky(hessian.flip(0, 1), what).flip(0, 1)
    upper = torch.linalg.solve_triangular(factor, _eye(factor), upper=True)
    return upper, dead


def _eye(matrix: torch.Tensor) -> torch.Tensor:
    return torch.eye(matrix.shape[0], device=matrix.device, dtype=matrix.dtype)
