"""Scores of masked language models: pseudo-log-likelihood, masked accuracy, cross entropy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import LongTensor, Tensor, nn

from compress.errors import CompressError
from compress.eval.quality.masks import share_mask
from compress.eval.quality.perplexity import check_ids, check_stream
from compress.eval.quality.stats import serial_mean
from compress.models.kind import require_masked
from compress.models.positions import positions_of
from compress.models.split_forward import SplitForward

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
    degrees: int | None = Field(
        default=None,
        description="of freedom of the standard errors of accuracy and cross entropy; None in "
        "older results",
    )
    masked_positions: int
    mask_fraction: float
    window: int = Field(description="tokens of text per window, or at most in a document")
    packing: Literal["stream", "documents"] = "stream"
    special_tokens: int = Field(
        default=2,
        description="tokens ([CLS], [SEP]) around each window or document; results from before "
        "this was recorded had both",
    )
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
    tokens: LongTensor | Sequence[LongTensor],
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
    """Score a masked language model on text: windows of a stream without overlap, or documents.

    Accuracy and cross entropy: ``mask_fraction`` of each window (at least one token) is masked at
    once, always by the mask token (no random or kept tokens as in BERT's training, which would
    measure the corruption). Pseudo-log-likelihood: ``pll_positions`` positions, drawn without
    replacement over the whole text, are masked one at a time. Both draws depend on ``seed``, the
    number of tokens and the window alone, so that two models see the same masks.

    Args:
        model: a ``...ForMaskedLM``; left as it was.
        tokens: token ids without special tokens: one stream [n], or documents [n] each, which are
            cut to the window and padded (padding is neither seen nor counted).
        mask_token_id: the tokenizer's mask token.
        prefix, suffix: ids put around each window or document ([CLS], [SEP]); never masked.
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
    text, sizes = _rows(tokens, window)
    length = text.shape[1] + len(prefix) + len(suffix)
    _check(model, text[_valid(sizes)], mask_token_id, length, mask_fraction)
    generator = torch.Generator().manual_seed(seed)
    fixed = share_mask(mask_fraction, _valid(sizes), generator)
    places = _valid(sizes).nonzero()
    copies = min(pll_positions, len(places))
    single = places[torch.randperm(len(places), generator=generator)[:copies].sort().values]
    total = len(text) + copies
    layout = _Layout(tuple(prefix), tuple(suffix), mask_token_id, _padding(model))
    found: list[list[tuple[float, float, int]]] = []
    with torch.no_grad(), SplitForward(model) as split:
        for owner, masks in ((torch.arange(len(text)), fixed), (single[:, 0], single[:, 1:])):
            scores: dict[int, tuple[float, float, int]] = {}
            # Rows of like length together: short documents are not padded to the longest one.
            for part in sizes[owner].argsort(stable=True).split(batch_size):
                rows = owner[part]
                hidden = masks[part] if masks is fixed else _one_hot(masks[part], text.shape[1])
                batch = _score(split, text[rows], hidden, sizes[rows], layout)
                scores |= dict(zip(part.tolist(), batch, strict=True))
                if progress:
                    progress(sum(map(len, found)) + len(scores), total)
            found.append([scores[i] for i in range(len(owner))])
    result = _result(found[0], found[1], single[:, 0], window, mask_fraction, seed)
    packing = "stream" if isinstance(tokens, Tensor) else "documents"
    around = len(prefix) + len(suffix)
    return result.model_copy(update={"packing": packing, "special_tokens": around})


@dataclass(frozen=True)
class _Layout:
    """What a row has beside its text."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    mask: int
    padding: int


def _rows(tokens: LongTensor | Sequence[LongTensor], window: int) -> tuple[Tensor, Tensor]:
    """Text as rows [n, at most window], and the tokens of each row [n]."""
    if isinstance(tokens, Tensor):
        check_stream(tokens, window, WHERE)
        rows = list(tokens[: len(tokens) // window * window].reshape(-1, window))
    else:
        rows = [document[:window] for document in tokens if len(document)]
    if not rows:
        raise CompressError("documents with tokens", "none", "Choose another text", where=WHERE)
    sizes = torch.tensor([len(row) for row in rows])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), sizes


def _valid(sizes: Tensor) -> Tensor:
    """Where rows [n] have text: bool [n, longest]."""
    return torch.arange(int(sizes.max())) < sizes[:, None]


def _one_hot(places: Tensor, length: int) -> Tensor:
    """Places [n, 1] as a mask bool [n, length]."""
    return torch.zeros(len(places), length, dtype=torch.bool).scatter_(1, places, True)


def _padding(model: nn.Module) -> int:
    found = getattr(model.config, "pad_token_id", None)
    return 0 if found is None else found


def _score(
    split: SplitForward, text: Tensor, hidden: Tensor, sizes: Tensor, layout: _Layout
) -> list[tuple[float, float, int]]:
    """Return per row (nats, hits, masked tokens); the head sees the masked positions only.

    Args:
        text: int64 [rows, longest or more], hidden: bool of that shape, sizes: int64 [rows].
    """
    device, longest = split.model.device, int(sizes.max())
    text, hidden = text[:, :longest], hidden[:, :longest]
    front, back = len(layout.prefix), len(layout.suffix)
    inputs = torch.full((len(text), front + longest + back), layout.padding)
    seen = torch.arange(inputs.shape[1]) < (sizes + front + back)[:, None]
    for row, (ids, size) in enumerate(zip(text, sizes.tolist(), strict=True)):
        masked = ids[:size].masked_fill(hidden[row, :size], layout.mask)
        before, after = (torch.tensor(e, dtype=ids.dtype) for e in (layout.prefix, layout.suffix))
        inputs[row, : front + size + back] = torch.cat([before, masked, after])
    states = split.hidden(
        input_ids=inputs.to(device), attention_mask=seen.to(device, inputs.dtype)
    )[:, front : front + longest]
    nll, hit = split.nll_and_hits(states[hidden.to(device)], text[hidden].to(device))
    nll, hit = nll.double().cpu(), hit.double().cpu()
    counts = hidden.sum(1).tolist()
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
    entropy, entropy_error, degrees = serial_mean([n for n, _, _ in fixed], counts)
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
        degrees=degrees,
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
    fraction: float,
) -> None:
    if not 0 < fraction < 1:
        raise CompressError("a mask fraction between 0 and 1", str(fraction), where=WHERE)
    check_ids(model, tokens, WHERE)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if not 0 <= mask_token_id < vocabulary:
        raise CompressError(
            f"a mask token id between 0 and {vocabulary - 1}",
            str(mask_token_id),
            "Use the model's own tokenizer",
            where=WHERE,
        )
    positions = positions_of(model.config)
    if positions and length > positions:
        raise CompressError(
            f"a window that fits the model's {positions} positions with its special tokens",
            f"{length} tokens",
            "Set a smaller window",
            where=WHERE,
        )
