"""Frechet distance between two sets of features.

Heusel et al. 2017 (https://arxiv.org/abs/1706.08500, eq. 6), with whatever encoder made the
features: the distance is named FD(<encoder>), since "FID" means one trained on ImageNet.
"""

from __future__ import annotations

import numpy as np

from compress.errors import CompressError

WHERE = "Frechet distance"


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Squared Frechet distance of the Gaussians with the moments of two sets of features.

    ``|m1 - m2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2))``. The trace of the root is the sum of the roots
    of the eigenvalues of ``S1^(1/2) S2 S1^(1/2)``, which is symmetric, so that neither a matrix
    root nor complex numbers are needed. Everything is computed in float64.

    Args:
        first, second: features [n, d], n at least 2 in each.

    Raises:
        CompressError: fewer than two rows, widths that differ, or features that are not finite.
    """
    first, second = (np.asarray(x, dtype=np.float64) for x in (first, second))
    _check(first, second)
    return gaussian_distance(
        first.mean(axis=0), np.cov(first, rowvar=False, ddof=1).reshape(2 * first.shape[1:]),
        second.mean(axis=0), np.cov(second, rowvar=False, ddof=1).reshape(2 * second.shape[1:]),
    )  # fmt: skip


def frechet_error(
    reference: np.ndarray, samples: np.ndarray, *, draws: int = 50, seed: int = 0
) -> float:
    """Standard error of the distance over what might have been sampled (bootstrap, Efron 1979)."""
    generator = np.random.default_rng(seed)
    picks = generator.integers(len(samples), size=(draws, len(samples)))
    return float(np.std([frechet_distance(reference, samples[pick]) for pick in picks], ddof=1))


def gaussian_distance(
    mean_1: np.ndarray, covariance_1: np.ndarray, mean_2: np.ndarray, covariance_2: np.ndarray
) -> float:
    """The same from means [d] and covariances [d, d]."""
    values, vectors = np.linalg.eigh(covariance_1)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ covariance_2 @ root)
    trace = np.trace(covariance_1) + np.trace(covariance_2)
    trace -= 2 * np.sqrt(cross.clip(min=0)).sum()
    # A set compared with itself gives 1e-14 of either sign.
    return max(0.0, float(np.square(mean_1 - mean_2).sum() + trace))


def _check(first: np.ndarray, second: np.ndarray) -> None:
    shapes = f"{list(first.shape)} and {list(second.shape)}"
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise CompressError("two sets of features [n, d] of the same d", shapes, where=WHERE)
    if min(len(first), len(second)) < 2:
        raise CompressError("at least two rows of features in each set", shapes, where=WHERE)
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise CompressError("finite features", "NaN or infinity", where=WHERE)
