"""Which token to propose for a mask, and which masks to fill first. All in float64.

Low precision lowers the entropy of what is sampled (Zheng et al. 2024,
https://arxiv.org/abs/2409.02908), which makes perplexities look better than they are.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

_TINY = 1e-300
NEVER = float("-inf")


def propose(
    logits: Tensor, uniform: Tensor, temperature: Tensor, top_k: int | None, top_p: float | None
) -> Tensor:
    """Draw a token from each row by inverting the distribution function.

    One uniform number a row is enough, and the draw does not depend on the other rows.

    Args:
        logits: float64 [n, vocabulary].
        uniform: float64 [n], in [0, 1).
        temperature: float64 [n]; 0 takes the first of the likeliest tokens.
        top_k, top_p: applied in this order, after the temperature. The likeliest token stays.

    Returns:
        int64 [n].
    """
    greedy = logits.argmax(dim=1)
    if not bool((temperature > 0).any()):
        return greedy
    scaled = logits / temperature.clamp_min(_TINY)[:, None].where(temperature[:, None] > 0, 1.0)
    if top_k is not None and top_k < scaled.shape[1]:
        bound = scaled.topk(top_k, dim=1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < bound, NEVER)
    probabilities = scaled.softmax(dim=1)
    if top_p is not None and top_p < 1:
        probabilities = _nucleus(probabilities, top_p)
    mass = probabilities.cumsum(dim=1)
    total = mass[:, -1:]
    # Strictly below the total, so that the token found has a positive probability.
    target = (uniform[:, None] * total).minimum(torch.nextafter(total, torch.zeros_like(total)))
    drawn = torch.searchsorted(mass, target, right=True)[:, 0]
    return torch.where(temperature > 0, drawn, greedy)


def _nucleus(probabilities: Tensor, share: float) -> Tensor:
    """Keep the fewest tokens whose probabilities reach ``share`` (Holtzman et al. 2020)."""
    values, places = probabilities.sort(dim=1, descending=True, stable=True)
    before = values.cumsum(dim=1) - values
    return torch.zeros_like(probabilities).scatter(1, places, values * (before < share))


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise from uniform numbers."""
    exponential = -torch.log(uniform.clamp_min(_TINY))
    return -torch.log(exponential.clamp_min(_TINY))


def preference(
    order: str,
    log_probs: Tensor,
    tokens: Tensor,
    uniform: Tensor,
    temperature: Tensor,
    rank: Tensor,
) -> Tensor:
    """How much each mask wants to be filled: the highest go first.

    confidence log p(token) + temperature * Gumbel (Chang et al. 2022, section 3.2): with
    temperature 1 the first k are drawn without replacement in proportion to p; low_confidence
    log p(token) (LLaDA's name for its rule "remask what has low confidence"); margin p1 - p2 and
    entropy, negative (Dream; Kim et al. 2025, https://arxiv.org/abs/2502.06768).

    Args:
        log_probs: float64 [n, vocabulary], at temperature 1.
        tokens: int64 [n], the proposals.
        uniform, temperature: float64 [n].
        rank: [n], place of the position in the fixed order of halton and left_to_right.

    Returns:
        float64 [n].
    """
    if order == "random":
        return uniform
    if order in ("halton", "left_to_right"):
        return -rank.double()
    if order == "margin":
        first, second = log_probs.exp().topk(min(2, log_probs.shape[1]), dim=1).values.unbind(1)
        return first - second
    if order == "entropy":
        return torch.special.xlogy(log_probs.exp(), log_probs.exp()).sum(dim=1)
    chosen = log_probs.gather(1, tokens[:, None])[:, 0]
    return chosen + temperature * gumbel(uniform) if order == "confidence" else chosen


def highest(scores: Tensor, counts: Tensor) -> Tensor:
    """The ``counts`` [rows] highest scores of each row, ties to the left: bool like ``scores``."""
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return rank < counts[:, None]


@lru_cache(maxsize=64)
def halton_ranks(rows: int, columns: int) -> Tensor:
    """Rank of each cell of a grid, row by row, in the order a Halton sequence visits them.

    Bases 2 (rows) and 3 (columns); a single row uses base 2 (van der Corput). Neighbours come far
    apart in the order (Besnier et al. 2025, https://arxiv.org/abs/2503.17076).

    Returns:
        int64 [rows * columns], a permutation.
    """
    cells, seen, number = rows * columns, {}, 0
    while len(seen) < cells:
        if rows == 1:
            cell = int(_radical_inverse(number, 2) * columns)
        else:
            high = int(_radical_inverse(number, 2) * rows)
            cell = high * columns + int(_radical_inverse(number, 3) * columns)
        seen.setdefault(cell, len(seen))
        number += 1
    return torch.tensor([seen[cell] for cell in range(cells)])


def _radical_inverse(number: int, base: int) -> float:
    """Digits of ``number`` mirrored at the point."""
    digits = max(1, math.ceil(math.log(number + 1, base)) + 1)
    value = 0
    for _ in range(digits):
        number, digit = divmod(number, base)
        value = value * base + digit
    return value / base**digits
