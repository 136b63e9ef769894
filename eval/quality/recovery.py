"""Hidden tokens recovered at fixed masks, and how far two models disagree about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from compress.errors import CompressError
from compress.eval.quality.denoising import WHERE, Denoise, Sequences, hidden_nll
from compress.eval.quality.masks import share_mask
from compress.eval.quality.stats import serial_mean


class RecoveryResult(BaseModel):
    """Scores at one share of hidden tokens. Errors take sequences as units, which as windows of one
    text correlate with their neighbours (:func:`compress.eval.quality.stats.serial_mean`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ratio: float = Field(description="share of the free tokens that is hidden at once")
    accuracy: float = Field(description="share of hidden tokens that are the model's first choice")
    accuracy_stderr: float | None
    cross_entropy: float = Field(description="nats per hidden token")
    cross_entropy_stderr: float | None
    divergence: float | None = Field(
        default=None, description="KL(original || this model) in nats per hidden token, same masks"
    )
    divergence_stderr: float | None = None
    degrees: int | None = Field(
        default=None,
        description="of freedom of the standard errors; None in older results, which took "
        "sequences as independent",
    )
    positions: int = Field(description="hidden tokens")
    seed: int


def recovery(
    denoise: Denoise,
    data: Sequences,
    mask_id: int,
    *,
    ratios: Sequence[float] = (0.15, 0.5, 0.85),
    original: Denoise | None = None,
    seed: int = 0,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[RecoveryResult, ...]:
    """Hide a fixed share of each sequence and score what the model says of it.

    Args:
        ratios: shares in (0, 1]; at least one token of a sequence is hidden.
        original: with it, the divergence from this model is measured too.
        seed: the masks depend on it, the ratio and the shape of the data alone.

    Raises:
        CompressError: a ratio out of range, vocabularies of different sizes, broken logits.
    """
    for ratio in ratios:
        if not 0 < ratio <= 1:
            raise CompressError("mask ratios above 0 and at most 1", str(ratio), where=WHERE)
    found = []
    for number, ratio in enumerate(ratios):
        hidden = share_mask(ratio, data.free, torch.Generator().manual_seed(seed))
        rows = torch.zeros(len(data), 3, dtype=torch.float64)
        done = number * len(data)
        for part, length in data.batches(batch_size):
            tokens = data.tokens[part, :length]
            rows[part] = _score(denoise, original, tokens, hidden[part, :length], mask_id)
            done += len(part)
            if progress:
                progress(done, len(ratios) * len(data))
        found.append(_result(ratio, rows, hidden, original is not None, seed))
    return tuple(found)


def _score(
    denoise: Denoise, original: Denoise | None, tokens: Tensor, hidden: Tensor, mask_id: int
) -> Tensor:
    """Nats, hits and divergence of each row, float64 [rows, 3]."""
    kept: list[Tensor] = []

    def keep(ids: Tensor) -> Tensor:
        kept.append(denoise(ids).cpu())
        return kept[0]

    nll, hits = hidden_nll(keep if original else denoise, tokens, hidden, mask_id)
    far = torch.zeros(hidden.shape, dtype=torch.float64)
    if original is not None:
        first = original(tokens.masked_fill(hidden, mask_id)).cpu()[hidden]
        far[hidden] = divergence(first, kept[0][hidden])
    return torch.stack([nll.sum(1), hits.double().sum(1), far.sum(1)], dim=1)


def divergence(first: Tensor, second: Tensor) -> Tensor:
    """KL(first || second) in nats of logits [n, vocabulary] each, float64 [n].

    Raises:
        CompressError: vocabularies of different sizes, or logits that are not finite.
    """
    if first.shape != second.shape:
        raise CompressError(
            "an original with the same vocabulary",
            f"{first.shape[-1]} tokens against {second.shape[-1]}", where=WHERE,
        )  # fmt: skip
    log_p, log_q = first.double().log_softmax(-1), second.double().log_softmax(-1)
    # Tokens that neither may produce are at minus infinity in both: they add nothing.
    terms = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q))
    total = terms.sum(dim=-1)
    if not torch.isfinite(total).all():
        raise CompressError(
            "finite logits and the same legal tokens in both models", "NaN or infinity",
            "Check the weights for NaN and masked_generation in both configs", where=WHERE,
        )  # fmt: skip
    return total.clamp(min=0.0)  # rounding may leave -1e-17


def _result(ratio: float, rows: Tensor, hidden: Tensor, paired: bool, seed: int) -> RecoveryResult:
    counts = hidden.sum(dim=1).tolist()
    entropy, accuracy, far = (serial_mean(c.tolist(), counts) for c in rows.unbind(1))
    return RecoveryResult(
        ratio=ratio,
        accuracy=accuracy.value,
        accuracy_stderr=accuracy.error,
        cross_entropy=entropy.value,
        cross_entropy_stderr=entropy.error,
        divergence=far.value if paired else None,
        divergence_stderr=far.error if paired else None,
        degrees=entropy.degrees,
        positions=sum(counts),
        seed=seed,
    )
