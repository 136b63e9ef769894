"""A block of several times the width gets the width of one again."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compress.linear.algebra import absorb_columns, cholesky, relative_error
from compress.linear.statistics import InputStatistics
from compress.methods.work import SiteWork
from compress.models.anatomy import ATTENTION_OUT, DOWN, BlockAnatomy
from compress.models.units import keep_units, unit_columns

# Ridge of the attention's fit, as a share of the mean input energy: as in the width methods.
_DAMPING = 0.001


def restore_heads(work: SiteWork, blocks: int, correction: bool) -> None:
    """Keep the key/value heads, with their queries, that send most to the residual stream.

    Args:
        work: the output projection of the attention of ``blocks`` blocks side by side.
        correction: fit the projection to what it used to compute, by least squares.
    """
    (name,) = work.names
    statistics, weight = work.statistics[name], work.weight(name)
    scores = head_scores(weight, statistics, work.anatomy)
    kept = _largest(scores, len(scores) // blocks)
    narrow = None
    if correction:
        gram = statistics.gram
        columns = unit_columns(work.anatomy, ATTENTION_OUT)[kept.cpu()].reshape(-1)
        columns = columns.to(weight.device)
        narrow = absorb_columns(weight, gram, columns, _DAMPING, work.label(name))
        work.metrics["error_uncorrected"] = relative_error(
            weight, weight[:, columns], gram, columns
        )
        work.metrics["error"] = relative_error(weight, narrow, gram, columns)
    work.kept_columns = keep_units(work.block, work.anatomy, ATTENTION_OUT, kept, narrow)


def head_scores(
    weight: torch.Tensor, statistics: InputStatistics, anatomy: BlockAnatomy
) -> torch.Tensor:
    """Output-weighted norm of each key/value head's group, summed over its query heads.

    Of a query head it is sqrt(sum_c E[o_c^2] |W_:c|^2): the channels of its output, each weighted
    by the norm of the column of the output projection that it meets.

    Args:
        weight: W [out, heads * head_dim]. statistics: of its inputs.

    Returns:
        [kv_heads].
    """
    energy = statistics.norm.square() * weight.square().sum(0)
    heads = energy.reshape(anatomy.heads, anatomy.head_dim).sum(1).sqrt()
    return heads.reshape(anatomy.kv_heads, -1).sum(1)


def restore_neurons(work: SiteWork, blocks: int, ridges: Sequence[float]) -> None:
    """Keep the neurons of highest ridge leverage, and let the down projection make up for the rest.

    Of several ridges that one counts with which the FFN's outputs on the calibration inputs change
    least.

    Args:
        work: the down projection of ``blocks`` blocks side by side, with the Gram matrix.
        ridges: see :func:`ridge`.
    """
    (name,) = work.names
    gram, weight = work.statistics[name].gram, work.weight(name)
    count = weight.shape[1] // blocks
    best: tuple[float, float, torch.Tensor, torch.Tensor] | None = None
    for multiple in ridges:
        penalty = ridge(gram, multiple)
        kept = _largest(leverage_scores(gram, penalty, work.label(name)), count)
        narrow = corrected(weight, gram, kept, penalty, work.label(name))
        error = relative_error(weight, narrow, gram, kept)
        if best is None or error < best[0]:
            best = error, multiple, kept, narrow
    assert best is not None  # there is at least one ridge
    error, multiple, kept, narrow = best
    work.metrics |= {
        "ridge": multiple, "error": error,
        "error_uncorrected": relative_error(weight, weight[:, kept], gram, kept),
    }  # fmt: skip
    work.kept_columns = keep_units(work.block, work.anatomy, DOWN, kept, narrow)


def ridge(gram: torch.Tensor, multiple: float) -> float:
    """lambda for a Gram matrix: a multiple of its mean singular value, which is the mean of the
    diagonal. (The papers' C is the Gram matrix over the number of tokens: lambda scales alike.)"""
    mean = float(gram.diagonal().double().mean())
    return multiple * mean if mean > 0 else 1.0


def leverage_scores(gram: torch.Tensor, penalty: float, what: str) -> torch.Tensor:
    """Ridge leverage of each feature, diag(C (C + lambda 1)^-1): how little the others can stand in
    for it, from 0 for a feature that is never active to 1. Two that repeat each other
    share one score, so both may stay: each is judged in the presence of all.

    Args:
        gram: C [n, n]. penalty: lambda. what: name of the layer for messages.

    Returns:
        [n], float64.
    """
    shifted = gram.double()
    shifted.diagonal().add_(penalty)
    inverse = torch.cholesky_inverse(cholesky(shifted, what))
    return 1 - penalty * inverse.diagonal()


def corrected(
    weight: torch.Tensor, gram: torch.Tensor, kept: torch.Tensor, penalty: float, what: str
) -> torch.Tensor:
    """W_K + W_R C_RK (C_KK + lambda 1)^-1, the least of |W X - W' X_K|^2 + lambda |W' - W_K|^2.

    Args:
        weight: W [out, n]. gram: C [n, n]. kept: K, ascending. penalty: lambda.

    Returns:
        W' [out, len(kept)].
    """
    if len(kept) == weight.shape[1]:
        return weight[:, kept]
    mean = float(gram.diagonal()[kept].double().mean())
    return absorb_columns(weight, gram, kept, penalty / mean if mean > 0 else 1.0, what)


def _largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the largest scores, ascending; of equals the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values
