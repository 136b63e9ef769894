"""Scores of masked language models: pseudo-log-likelihood, masked accuracy, cross entropy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import LongTensor, Tensor, nn

from compress.errors import CompressError
from compress.eval.kind import require_masked
from compress.eval.quality.masks import share_mask
from compress.eval.quality.perplexity import check_tokens
from compress.eval.quality.split_forward import SplitForward
from compress.eval.stats import serial_mean

WHERE = "masked scores"


class MaskedResult(BaseModel):
    """What :func:`masked_scores` measured; JSON-serialisable. Errors are over windows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pll: float = Field(
        description="mean log-probability (nats, negative) of a token whose own position alone is "
        "masked (Salazar et al. 2020, eq. 2, per token)"
    )
    pll_stderr: float | None
    pseudo_perplexity: float = Field(description="exp(-pll) (Salazar et al. 2020, eq. 3)")
    pseudo_perplexity_interval: tuple[float, float] | None = Field(description="95 % interval")
    pll_positions: int = Field(description="positions that were masked one at a time")
    accuracy: float = Field(description="share of masked tokens that are the model's first choice")
    accuracy_stderr: float | None
    cross_entropy: float = Field(description="nats per masked token at the fixed mask")
    cross_entropy_stderr: float | None
    masked_positions: int
    mask_fraction: float
    window: int
    seed: int
    window_nll: list[float] = Field(
        description="mean cross entropy per window, so that two models can be compared by window"
    )
    window_accuracy: list[float] | None = Field(
        default=None, description="accuracy per window; None in older results"
    )
    window_tokens: list[int] | None = Field(
        default=None, description="masked tokens per window; None in older results"
    )


def masked_scores(
    model: nn.Module,
    tokens: LongTensor,
    *,
    mask_token_id: int,
    prefix: Sequence[int] = (),
    suffix: Sequence[int] = (),
    window: int = 128,
    mask_fraction: float = 0.15,
    pll_positions: int = 256,
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> MaskedResult:
    """Score a masked language model on ``tokens`` cut into windows without overlap.

    Accuracy and cross entropy: ``mask_fraction`` of each window (at least one token) is masked at
    once, always by the mask token (no random or kept tokens as in BERT's training, which would
    measure the corruption). Pseudo-log-likelihood: ``pll_positions`` positions, drawn without
    replacement over the whole text, are masked one at a time. Both draws depend on ``seed``, the
    number of tokens and the window alone, so that two models see the same masks.

    Args:
        model: a ``...ForMaskedLM``; left as it was.
        tokens: token ids [n] without special tokens.
        mask_token_id: the tokenizer's mask token.
        prefix, suffix: ids put around each window ([CLS], [SEP]); never masked.
        window: tokens of text per window, ``prefix`` and ``suffix`` not counted.
        mask_fraction: share of masked tokens, in (0, 1).
        pll_positions: how many one-masked copies to run; more gives a smaller error.
        batch_size: windows (or copies) per forward.
        progress: called with (rows done, rows in all).

    Raises:
        CompressError: not a masked model, ids outside the vocabulary, too few tokens, too long a
            window, or logits that are not finite.
    """
    require_masked(model, WHERE)
    _check(model, tokens, mask_token_id, window + len(prefix) + len(suffix), window, mask_fraction)
    generator = torch.Generator().manual_seed(seed)
    text = tokens[: len(tokens) // window * window].reshape(-1, window)
    fixed = share_mask(mask_fraction, torch.ones(text.shape, dtype=torch.bool), generator)
    copies = min(pll_positions, text.numel())
    sampled = torch.randperm(text.numel(), generator=generator)[:copies].sort().values
    total = len(text) + copies
    edges = (torch.tensor(prefix, dtype=torch.long), torch.tensor(suffix, dtype=torch.long))
    rows: list[list[tuple[float, float, int]]] = []
    with torch.no_grad(), SplitForward(model) as split:
        for jobs in (_fixed_jobs(text, fixed), _single_jobs(text, sampled)):
            scores = []
            for batch in _batched(jobs, batch_size):
                scores += _score(split, batch, mask_token_id, edges)
                if progress:
                    progress(sum(map(len, rows)) + len(scores), total)
            rows.append(scores)
    return _result(rows[0], rows[1], sampled // window, window, mask_fraction, seed)


def _fixed_jobs(text: Tensor, mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(text, mask, strict=True)


def _single_jobs(text: Tensor, positions: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for position in positions.tolist():
        row, column = divmod(position, text.shape[1])
        mask = torch.zeros(text.shape[1], dtype=torch.bool)
        mask[column] = True
        yield text[row], mask


def _batched(jobs: Iterator, size: int) -> Iterator[list]:
    batch = []
    for job in jobs:
        batch.append(job)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _score(
    split: SplitForward,
    batch: list[tuple[Tensor, Tensor]],
    mask_token_id: int,
    edges: tuple[Tensor, Tensor],
) -> list[tuple[float, float, int]]:
    """Return per row (nats, hits, masked tokens); the head sees the masked positions only."""
    device = split.model.device
    text = torch.stack([row for row, _ in batch])
    mask = torch.stack([m for _, m in batch])
    before, after = (edge.expand(len(batch), -1) for edge in edges)
    inputs = torch.cat([before, text.masked_fill(mask, mask_token_id), after], dim=1).to(device)
    hidden = split.hidden(input_ids=inputs, attention_mask=torch.ones_like(inputs))
    hidden = hidden[:, len(edges[0]) : len(edges[0]) + text.shape[1]]
    nll, hit = split.nll_and_hits(hidden[mask.to(device)], text[mask].to(device))
    nll, hit = nll.double().cpu(), hit.double().cpu()
    counts = mask.sum(1).tolist()
    return [
        (n.sum().item(), h.sum().item(), c)
        for n, h, c in zip(nll.split(counts), hit.split(counts), counts, strict=True)
    ]


def _result(
    fixed: list[tuple[float, float, int]],
    single: list[tuple[float, float, int]],
    owner: Tensor,
    window: int,
    fraction: float,
    seed: int,
) -> MaskedResult:
    counts = [c for _, _, c in fixed]
    entropy, entropy_error, _ = serial_mean([n for n, _, _ in fixed], counts)
    accuracy, accuracy_error, _ = serial_mean([h for _, h, _ in fixed], counts)
    # Single masks drawn from one window share its text: pool them before taking the error.
    pooled: dict[int, tuple[float, int]] = {}
    for index, (nats, _, _) in zip(owner.tolist(), single, strict=True):
        total, number = pooled.get(index, (0.0, 0))
        pooled[index] = (total + nats, number + 1)
    single_masks = [pooled[index] for index in sorted(pooled)]
    nll, error, _ = found = serial_mean([t for t, _ in single_masks], [c for _, c in single_masks])
    bounds = found.interval
    return MaskedResult(
        pll=-nll,
        pll_stderr=error,
        pseudo_perplexity=math.exp(min(nll, 700.0)),
        pseudo_perplexity_interval=bounds and tuple(math.exp(min(b, 700.0)) for b in bounds),
        pll_positions=len(single),
        accuracy=accuracy,
        accuracy_stderr=accuracy_error,
        cross_entropy=entropy,
        cross_entropy_stderr=entropy_error,
        masked_positions=sum(counts),
        mask_fraction=fraction,
        window=window,
        seed=seed,
        window_nll=[n / c for n, _, c in fixed],
        window_accuracy=[h / c for _, h, c in fixed],
        window_tokens=counts,
    )


def _check(
    model: nn.Module,
    tokens: LongTensor,
    mask_token_id: int,
    length: int,
    window: int,
    fraction: float,
) -> None:
    if not 0 < fraction < 1:
        raise CompressError("a mask fraction between 0 and 1", str(fraction), where=WHERE)
    check_tokens(model, tokens, window, WHERE)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if not 0 <= mask_token_id < vocabulary:
        raise CompressError(
            f"a mask token id between 0 and {vocabulary - 1}",
            str(mask_token_id),
            "Use the model's own tokenizer",
            where=WHERE,
        )
    config = model.config
    positions = getattr(config, "max_position_embeddings", None)
    if positions and config.model_type in ("roberta", "xlm-roberta", "camembert", "esm"):
        # RoBERTa numbers positions from padding_idx + 1, so that many of the table are never used.
        positions -= (config.pad_token_id or 0) + 1
    if positions and length > positions:
        raise CompressError(
            f"a window that fits the model's {positions} positions with its special tokens",
            f"{length} tokens",
            "Set a smaller window",
            where=WHERE,
        )
