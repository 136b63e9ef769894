"""Token perplexity of a causal language model, with an interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import LongTensor, nn

from compress.errors import CompressError
from compress.eval.quality.stats import serial_mean
from compress.models.kind import require_causal
from compress.models.positions import positions_of
from compress.models.split_forward import SplitForward

WHERE = "perplexity"


class PerplexityResult(BaseModel):
    """What :func:`perplexity` measured; JSON-serialisable."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    perplexity: float = Field(description="exp of the mean negative log-likelihood per token")
    interval: tuple[float, float] | None = Field(
        description="95 % interval of the perplexity; neighbouring windows may correlate"
    )
    nll: float = Field(description="mean negative log-likelihood, nats per predicted token")
    nll_stderr: float | None = Field(description="standard error of nll")
    bits_per_byte: float | None = Field(
        default=None,
        description="nll in bits times tokens per byte of the text; tokens that no window predicts "
        "are charged the mean",
    )
    tokens: int = Field(description="predicted tokens")
    window: int = Field(description="tokens of text per window; its first one is context only")
    stride: int = Field(description="tokens between window starts; below window, windows overlap")
    special_tokens: int = Field(
        default=0, description="tokens (BOS) in front of each window, context only"
    )
    window_nll: list[float] = Field(
        description="mean nats per window, so that two models can be compared window by window"
    )
    window_tokens: list[int] | None = Field(
        default=None, description="predicted tokens per window; None in older results"
    )


def perplexity(
    model: nn.Module,
    tokens: LongTensor,
    *,
    prefix: Sequence[int] = (),
    window: int = 1024,
    stride: int | None = None,
    batch_size: int = 1,
    bytes_count: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PerplexityResult:
    """Measure the perplexity of ``model`` on ``tokens``.

    The text is cut into windows of ``window`` tokens that start every ``stride`` tokens (default:
    ``window``, no overlap); what is left after the last whole window is not used. The first token
    of each window is context, not predicted. With ``stride < window`` only the last ``stride``
    tokens of a window score (the first window scores all it predicts), so each token is predicted
    once, from at least ``window - stride`` tokens. lm-eval's ``loglikelihood_rolling`` with a
    maximum length L is ``window=L+1, stride=L`` on the prefix token followed by the text.

    ``prefix`` (BOS) stands in front of each window and is context. The first token of a window is
    not predicted from it: with and without a prefix the same tokens count, so that two perplexities
    differ by what the model makes of the prefix and by nothing else. The model runs ``window - 1 +
    len(prefix)`` positions.

    Args:
        model: any causal ``PreTrainedModel``; left as it was.
        tokens: token ids [n] of the text, without special tokens.
        prefix: ids in front of each window.
        window, stride: tokens of text.
        batch_size: windows per forward.
        bytes_count: UTF-8 bytes of the text behind ``tokens``; gives bits per byte.
        progress: called with (windows done, windows in all).

    Raises:
        CompressError: not a causal model; fewer tokens than one window; ids outside the
            vocabulary; a window longer than the model's positions; NaN or infinite logits.
    """
    stride = window if stride is None else stride
    _check_windows(model, tokens, window, stride, len(prefix))
    require_causal(model, WHERE)
    starts = list(range(0, len(tokens) - window + 1, stride))
    sums: list[float] = []
    counts: list[int] = []
    front = torch.tensor(list(prefix), dtype=tokens.dtype)
    with torch.no_grad(), SplitForward(model) as split:
        for first in range(0, len(starts), batch_size):
            batch = starts[first : first + batch_size]
            rows = torch.stack([torch.cat([front, tokens[s : s + window]]) for s in batch])
            rows = rows.to(model.device)
            # The last token predicts nothing, so it need not be run.
            hidden = split.hidden(input_ids=rows[:, :-1])
            for row, states in enumerate(hidden):
                scored = window - 1 if batch[row] == 0 else min(stride, window - 1)
                nll = split.nll(states[-scored:], rows[row, -scored:])
                sums.append(nll.double().sum().item())
                counts.append(scored)
            if progress:
                progress(first + len(batch), len(starts))
    return _result(sums, counts, window, stride, len(prefix), len(tokens), bytes_count)


def _result(
    sums: list[float],
    counts: list[int],
    window: int,
    stride: int,
    prefix: int,
    tokens: int,
    bytes_count: int | None,
) -> PerplexityResult:
    mean, error, _ = found = serial_mean(sums, counts)
    bounds = found.interval
    return PerplexityResult(
        perplexity=_exp(mean),
        interval=None if bounds is None else (_exp(bounds[0]), _exp(bounds[1])),
        nll=mean,
        nll_stderr=error,
        bits_per_byte=None if not bytes_count else mean * tokens / (math.log(2) * bytes_count),
        tokens=sum(counts),
        window=window,
        stride=stride,
        special_tokens=prefix,
        window_nll=[s / n for s, n in zip(sums, counts, strict=True)],
        window_tokens=counts,
    )


def _exp(nats: float) -> float:
    """exp that saturates: a ruined model has tens of nats per token, and JSON has no infinity."""
    return math.exp(min(nats, 700.0))


def _check_windows(
    model: nn.Module, tokens: LongTensor, window: int, stride: int, prefix: int
) -> None:
    if window < 2 or not 1 <= stride <= window:
        raise CompressError(
            "a window of at least 2 tokens and a stride between 1 and the window",
            f"window {window}, stride {stride}",
            where=WHERE,
        )
    check_stream(tokens, window, WHERE)
    check_ids(model, tokens, WHERE)
    positions = positions_of(model.config)
    if positions and window - 1 + prefix > positions:
        raise CompressError(
            f"a window that fits the model's {positions} positions",
            f"{window} tokens" + (f" behind {prefix} special ones" if prefix else ""),
            f"Set window to {positions - max(0, prefix - 1)} or less",
            where=WHERE,
        )


def check_stream(tokens: LongTensor, window: int, where: str) -> None:
    """Refuse token ids that are too few or of the wrong shape."""
    if tokens.dim() != 1 or tokens.is_floating_point():
        raise CompressError(
            "token ids as a one-dimensional integer tensor",
            f"shape {tuple(tokens.shape)}, {tokens.dtype}",
            where=where,
        )
    if len(tokens) < window:
        raise CompressError(
            f"at least one window of {window} tokens",
            f"{len(tokens)} tokens",
            "Give a longer text or a smaller window",
            where=where,
        )


def check_ids(model: nn.Module, tokens: LongTensor, where: str) -> None:
    """Refuse token ids that are not in the model's vocabulary."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise CompressError(
            f"token ids between 0 and {vocabulary - 1}",
            f"{low if low < 0 else high}",
            "The tokens come from a tokenizer that does not fit this model; use the model's own",
            where=where,
        )
