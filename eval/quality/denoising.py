"""What a denoiser says of hidden tokens: the one forward that every masked score is made of.

A denoiser is a function from token ids [rows, length] to logits [rows, length, vocabulary] in which
ids that may not be produced are at minus infinity (:class:`compress.generators.Denoiser` is one).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import LongTensor, Tensor

from compress.errors import CompressError

Denoise = Callable[[LongTensor], Tensor]
WHERE = "masked evaluation"


@dataclass(frozen=True)
class Sequences:
    """Token sequences that a masked generator is scored on.

    Attributes:
        tokens: int64 [rows, length], condition tokens included; what lies behind the end of a
            shorter row is never read.
        free: bool [rows, length]; False where a token is never hidden nor scored: a class token,
            a prompt, [CLS] and [SEP], padding.
        sizes: int64 [rows], tokens of each row.
        bytes_per_token: UTF-8 bytes of the text per free token, where there is a text.
    """

    tokens: LongTensor
    free: Tensor
    sizes: Tensor
    bytes_per_token: float | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def head(self, rows: int) -> Sequences:
        """The first ``rows`` sequences."""
        first = (self.tokens[:rows], self.free[:rows], self.sizes[:rows])
        return Sequences(*first, self.bytes_per_token)

    @property
    def lengths(self) -> Tensor:
        """Free positions of each row, int64 [rows]."""
        return self.free.sum(dim=1)

    def batches(self, size: int, rows: Tensor | None = None) -> Iterator[tuple[Tensor, int]]:
        """Batches of at most ``size`` rows of one length, which need no padding.

        Args:
            rows: int64, which rows (again where one is repeated); all if None.

        Yields:
            Indices into ``rows`` int64 [n], and the length of these sequences.
        """
        sizes = self.sizes if rows is None else self.sizes[rows]
        for length in sizes.unique().tolist():
            for part in (sizes == length).nonzero()[:, 0].split(size):
                yield part, length


def sequences(
    tokens: LongTensor,
    *,
    fixed: Tensor | None = None,
    sizes: Tensor | None = None,
    bytes_per_token: float | None = None,
) -> Sequences:
    """Check token ids [rows, length] and the positions that stay visible.

    Args:
        fixed: bool [rows, length] or [length]: never hidden (a prompt, a class token).
        sizes: int64 [rows], tokens of each row, where some are padded.

    Raises:
        CompressError: not a matrix of integers, no rows, or a row with nothing to predict.
    """
    if tokens.dim() != 2 or tokens.is_floating_point() or not tokens.numel():
        raise CompressError(
            "token ids [sequences, length], at least one", f"{tokens.dtype} {list(tokens.shape)}",
            where=WHERE,
        )  # fmt: skip
    rows, length = tokens.shape
    sizes = torch.full((rows,), length) if sizes is None else sizes.cpu()
    free = torch.arange(length) < sizes[:, None]
    if fixed is not None:
        free &= ~fixed.cpu().expand(tokens.shape)
    empty = (free.sum(dim=1) == 0).nonzero()
    if len(empty):
        raise CompressError(
            "at least one token to predict in every sequence",
            f"sequence {int(empty[0])}, all of whose labels are visible",
            "Leave such sequences out, or make the prompt shorter",
            where=WHERE,
        )
    return Sequences(tokens.cpu(), free, sizes, bytes_per_token)


def hidden_nll(
    denoise: Denoise, tokens: LongTensor, hidden: Tensor, mask_id: int
) -> tuple[Tensor, Tensor]:
    """Score hidden tokens from the visible ones.

    Args:
        tokens: int64 [rows, length].
        hidden: bool [rows, length].

    Returns:
        Negative log-likelihood in nats (float64) and whether the token is the likeliest one (bool),
        both [rows, length] on the CPU, zero where nothing is hidden.

    Raises:
        CompressError: logits that are not finite, or a token that the denoiser may not produce.
    """
    logits = denoise(tokens.masked_fill(hidden, mask_id)).cpu()[hidden].double()
    target = tokens[hidden]
    chosen = logits.gather(1, target[:, None])[:, 0]
    total = logits.logsumexp(dim=1)
    if not torch.isfinite(total).all():
        raise CompressError(
            "finite logits", "NaN or infinity",
            "The model is broken: check its weights for NaN and its dtype for overflow",
            where=WHERE,
        )  # fmt: skip
    if not torch.isfinite(chosen).all():
        token = int(target[~torch.isfinite(chosen)][0])
        raise CompressError(
            "sequences of tokens that the model may produce",
            f"token {token}, which it never does",
            "Leave special tokens out of the text, or mend masked_generation in the config",
            where=WHERE,
        )
    nll = torch.zeros(tokens.shape, dtype=torch.float64)
    hits = torch.zeros(tokens.shape, dtype=torch.bool)
    nll[hidden] = total - chosen
    hits[hidden] = logits.argmax(dim=1) == target
    return nll, hits
