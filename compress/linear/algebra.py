"""Linear algebra that several methods share. Everything works on float32 matrices on one device."""

from __future__ import annotations

import torch

from compress.errors import CompressError
from compress.linear.descent import descend


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
    # One matrix less in memory at each line: these are the largest that a step holds.
    hessian, dead = damped(gram, damping)
    hessian = hessian.flip(0, 1)
    factor = cholesky(hessian, what)
    del hessian
    factor = factor.flip(0, 1)
    upper = torch.linalg.solve_triangular(factor, _eye(factor), upper=True)
    return upper, dead


def _eye(matrix: torch.Tensor) -> torch.Tensor:
    return torch.eye(matrix.shape[0], device=matrix.device, dtype=matrix.dtype)


def absorb_columns(
    weight: torch.Tensor, gram: torch.Tensor, kept: torch.Tensor, damping: float, what: str
) -> torch.Tensor:
    """Weight on fewer inputs that does the work of the lost ones, as far as it can be done.

    With S the kept and R the lost features, x_R is predicted from x_S by ridge regression, and what
    the lost columns did is done by the kept ones: W_S + W_R G_RS (G_SS + ridge)^-1. Without damping
    this is W G_:S G_SS^-1, the least squares solution; with it, features that were never active
    keep their weights, and losing nothing changes nothing.

    Args:
        weight: W [out, n]. gram: G [n, n]. kept: indices of S, ascending.
        damping: ridge as a share of the mean of the diagonal of G_SS.

    Returns:
        [out, len(kept)].
    """
    lost = _complement(kept, weight.shape[1])
    inner = gram[kept][:, kept].double()
    mean = inner.diagonal().mean()
    inner.diagonal().add_(damping * (mean if mean > 0 else 1.0))
    factor = cholesky(inner, what)
    predictor = torch.cholesky_solve(gram[kept][:, lost].double(), factor).t()
    return weight[:, kept] + weight[:, lost] @ predictor.to(weight.dtype)


def absorb_columns_in_mask(
    weight: torch.Tensor,
    gram: torch.Tensor,
    kept: torch.Tensor,
    damping: float,
    iterations: int = 64,
) -> torch.Tensor:
    """As :func:`absorb_columns`, but zeros of the kept columns stay zero.

    Each row is a least squares problem on its own set of columns. All rows are solved together by
    conjugate gradients on the masked normal equations, preconditioned by the diagonal and started
    from the kept columns as they are, so that no iteration leaves the error larger than it was.

    Returns:
        [out, len(kept)].
    """
    lost = _complement(kept, weight.shape[1])
    start = weight[:, kept]
    # Residual of the normal equations at the start: what the lost columns contributed.
    residual = weight[:, lost] @ gram[lost][:, kept]
    return _masked_descent(start, residual, gram[kept][:, kept], start != 0, damping, iterations)


def refit_masked(
    weight: torch.Tensor,
    gram: torch.Tensor,
    mask: torch.Tensor,
    damping: float,
    iterations: int = 64,
) -> torch.Tensor:
    """Weights on a fixed mask that do the work of the dense ones: argmin |(W - W') X|^2 with W' = 0
    outside the mask, started from W * mask.

    Args:
        weight: W [out, in], dense. gram: X^T X [in, in]. mask: bool [out, in].
        damping: ridge towards the start, as a share of the mean of the diagonal of X^T X.

    Returns:
        [out, in].
    """
    start = weight * mask
    return _masked_descent(start, (weight - start) @ gram, gram, mask, damping, iterations)


def solve_masked(
    start: torch.Tensor,
    targets: torch.Tensor,
    gram: torch.Tensor,
    mask: torch.Tensor,
    damping: float,
    iterations: int = 24,
) -> torch.Tensor:
    """Descend from ``start`` [rows, n], zero off the mask, towards the x that is zero off it and
    has x gram = targets on it; ``damping`` as in :func:`refit_masked`."""
    return _masked_descent(start, targets - start @ gram, gram, mask, damping, iterations)


def _masked_descent(
    start: torch.Tensor,
    residual: torch.Tensor,
    gram: torch.Tensor,
    mask: torch.Tensor,
    damping: float,
    iterations: int,
) -> torch.Tensor:
    """:func:`descend` in a Gram matrix, damped and preconditioned by its diagonal."""
    inner = gram.clone()
    mean = inner.diagonal().mean()
    inner.diagonal().add_(damping * (mean if mean > 0 else 1.0))
    scale = 1 / inner.diagonal()
    return descend(start, residual, lambda rows: rows @ inner, mask, iterations, scale)


def relative_error(
    weight: torch.Tensor, narrow: torch.Tensor, gram: torch.Tensor, kept: torch.Tensor
) -> float:
    """Share of a linear's output energy that a weight on fewer inputs gets wrong.

    ||W X - W' X_S||^2 / ||W X||^2 from G = X X^T; 0 where the output is zero.
    """
    difference = weight.clone()
    difference[:, kept] -= narrow
    wrong = ((difference @ gram) * difference).sum(dtype=torch.float64)
    energy = ((weight @ gram) * weight).sum(dtype=torch.float64)
    return float(wrong / energy) if energy > 0 else 0.0


def _complement(kept: torch.Tensor, size: int) -> torch.Tensor:
    mask = torch.ones(size, dtype=torch.bool, device=kept.device)
    mask[kept] = False
    return mask.nonzero().flatten()


def principal_outputs(
    weight: torch.Tensor,
    rank: int,
    scale: torch.Tensor | None = None,
    gram: torch.Tensor | None = None,
    what: str = "a linear layer",
) -> tuple[torch.Tensor, float]:
    """Leading left singular vectors of W S, S S^T the metric in which inputs are measured.

    Got as eigenvectors of (W S)(W S)^T or, where that is the larger of the two, through those of
    (W S)^T (W S): several times faster than an SVD, and in float64 as accurate as one in float32.

    Args:
        weight: W [out, in].
        scale: diagonal of S [in]; gram: the metric G = S S^T [in, in]; neither: S = 1.
        what: name of the layer for messages.

    Returns:
        Orthonormal columns [out, rank], float64, and the share of ||W S||^2 outside their span.

    Raises:
        CompressError: the metric holds NaN or infinity.
    """
    outs, ins = weight.shape
    wide = weight.double()
    if scale is not None:
        wide = wide * scale
    if gram is not None and not torch.isfinite(gram).all():
        cholesky(gram, what)  # raises with the explanation
    if outs <= ins:
        square = wide @ wide.t() if gram is None else wide @ gram.double() @ wide.t()
        values, vectors = torch.linalg.eigh((square + square.t()) / 2)
    else:
        if gram is not None:
            wide = wide @ _square_root(gram.double())
        values, right = torch.linalg.eigh(wide.t() @ wide)
        # Q of a QR rather than division by singular values, some of which may be zero.
        vectors = torch.linalg.qr((wide @ right).flip(1))[0].flip(1)
    values = values.clamp_min(0)
    total = values.sum()
    lost = values[: len(values) - rank].sum()
    return vectors[:, -rank:].flip(1), float(lost / total) if total > 0 else 0.0


def _square_root(gram: torch.Tensor) -> torch.Tensor:
    """The symmetric square root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(gram)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.t()
