"""Training losses of masked generators: one cross entropy, three ways to weigh it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.generators.masking import IGNORE

Weighting = Literal["maskgit", "mdlm", "llada"]


def masked_loss(
    logits: Tensor,
    labels: Tensor,
    ratios: Tensor,
    weighting: Weighting = "mdlm",
    label_smoothing: float = 0.0,
    *,
    lengths: Tensor | None = None,
) -> Tensor:
    """Cross entropy of masked tokens; visible positions do not count.

    maskgit: mean over the masked tokens of the batch (Chang et al. 2022, eq. 2).
    mdlm: (1/t) sum over masked tokens, over the number of tokens of the batch: a bound on nats per
    token, when tokens are masked independently with probability t (Sahoo et al. 2024, eq. 10 with
    the log-linear schedule, whose weight is 1/t exactly).
    llada: the same, divided row by row by the row's tokens before the mean (Nie et al. 2025,
    eqs. 3 and 5); it differs from mdlm where rows have different lengths.

    Args:
        logits: [rows, length, vocabulary], tokens that may not be produced at minus infinity.
        labels: int64 [rows, length], -100 at visible positions.
        ratios: [rows], the mask probabilities; maskgit ignores them.
        label_smoothing: share of the target spread over the tokens that may be produced.
        lengths: [rows], tokens that could have been masked (prompt and padding left out); by
            default all.

    Returns:
        A scalar with a gradient.

    Raises:
        CompressError: maskgit with labels that are all visible.
    """
    hidden = labels != IGNORE
    loss = torch.zeros(labels.shape, dtype=torch.float32, device=logits.device)
    loss = loss.masked_scatter(
        hidden, _cross_entropy(logits[hidden].float(), labels[hidden], label_smoothing)
    )
    if weighting == "maskgit":
        if not bool(hidden.any()):
            raise CompressError(
                "at least one masked token", "labels that are all visible",
                "Mask a token of each batch", where="masked loss",
            )  # fmt: skip
        return loss.sum() / hidden.sum()
    if lengths is None:
        lengths = torch.full((len(labels),), labels.shape[1])
    lengths = lengths.to(logits.device, torch.float32)
    rows = loss.sum(dim=1) / ratios.to(logits.device, torch.float32)
    return rows.sum() / lengths.sum() if weighting == "mdlm" else (rows / lengths).mean()


def _cross_entropy(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """[n, vocabulary], [n] -> [n]; smoothing over finite logits only."""
    log_probs = logits.log_softmax(dim=-1)
    loss = -log_probs.gather(1, targets[:, None])[:, 0]
    if smoothing:
        legal = torch.isfinite(logits)
        spread = log_probs.masked_fill(~legal, 0.0).sum(dim=1) / legal.sum(dim=1)
        loss = (1 - smoothing) * loss - smoothing * spread
    return loss
