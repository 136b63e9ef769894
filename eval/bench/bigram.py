"""A bigram model of tokens: what a masked diffusion model of text must beat to have learnt more."""

from __future__ import annotations

import math

import torch
from torch import LongTensor, Tensor

from compress.errors import CompressError

DISCOUNT = 0.75


def bigram_nll(
    train: LongTensor, test: LongTensor, vocabulary: int, discount: float = DISCOUNT
) -> float:
    """Mean negative log-likelihood of ``test`` under a bigram model of ``train``, nats per token.

    Interpolated Kneser-Ney (Kneser and Ney 1995; Chen and Goodman 1999, eqs. 21 and 23): each count
    gives up ``discount``, and what is gained goes to words by the number of different words that
    they follow, itself discounted in favour of a uniform law. The first token is given.

    Args:
        train, test: int64 [n], ids below ``vocabulary``.
        discount: in (0, 1).

    Raises:
        CompressError: fewer than two tokens, or ids outside the vocabulary.
    """
    for name, ids in (("training", train), ("test", test)):
        if ids.dim() != 1 or len(ids) < 2:
            raise CompressError(f"at least two {name} tokens in a row", str(list(ids.shape)))
        if not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise CompressError(
                f"token ids from 0 to {vocabulary - 1}", f"{int(ids.min())} to {int(ids.max())}"
            )
    pairs, counts = torch.unique(train[:-1] * vocabulary + train[1:], return_counts=True)
    before, after = pairs // vocabulary, pairs % vocabulary
    backoff = _continuation(after, vocabulary, discount)
    total = torch.zeros(vocabulary, dtype=torch.float64).index_add_(0, before, counts.double())
    kinds = torch.bincount(before, minlength=vocabulary).double()
    wanted = test[:-1] * vocabulary + test[1:]
    place = torch.searchsorted(pairs, wanted).clamp(max=len(pairs) - 1)
    seen = torch.where(pairs[place] == wanted, counts[place].double() - discount, 0.0)
    history = test[:-1]
    # A word that never stood before another says nothing: the backoff takes all.
    weight = torch.where(total[history] > 0, discount * kinds[history] / total[history], 1.0)
    known = torch.where(total[history] > 0, seen / total[history], 0.0)
    return float(-(known + weight * backoff[test[1:]]).log().mean())


def _continuation(after: Tensor, vocabulary: int, discount: float) -> Tensor:
    """The share of different bigrams that end in each word, mixed with a uniform law."""
    follows = torch.bincount(after, minlength=vocabulary).double()
    left = discount * float((follows > 0).sum()) / float(follows.sum())
    return (follows - discount).clamp_min(0) / follows.sum() + left / vocabulary


def bits_per_byte(nll: float, tokens: int, count: int) -> float:
    """From nats per token to bits per byte of ``count`` bytes."""
    return nll / math.log(2) * tokens / count
