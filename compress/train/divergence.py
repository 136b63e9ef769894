"""How far a student's predictions are from a teacher's: all of them, or the likeliest alone.

The Kullback-Leibler divergence of two distributions over a vocabulary V does not grow when outcomes
are lumped together. With a teacher's k likeliest tokens apart and all others in one bucket it is
that of k + 1 outcomes: never more than the whole one, equal for k = |V| - 1, and all that has to be
known of the teacher are k tokens, their shares and that of the rest.
"""

from __future__ import annotations

import torch
from torch.nn import functional


def divergence(logits: torch.Tensor, wanted: torch.Tensor, heat: float) -> torch.Tensor:
    """KL(teacher || student) in nats, summed over positions, times ``heat`` squared.

    Args:
        logits, wanted: of the student and the teacher, float32 [positions, vocabulary].
        heat: temperature of both distributions. The gradient of the softened divergence shrinks
            with its square (Hinton et al. 2015, arXiv 1503.02531), which the factor makes up for.
    """
    apart = functional.kl_div(
        functional.log_softmax(logits / heat, -1),
        functional.log_softmax(wanted / heat, -1),
        reduction="sum",
        log_target=True,
    )
    return apart * heat**2


def top_shares(logits: torch.Tensor, count: int, heat: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest tokens of each position, and the shares that they and all others have.

    Args:
        logits: of the teacher, float32 [..., vocabulary].
        count: k; at most one less than there are tokens.
        heat: temperature of the distribution.

    Returns:
        Tokens int32 [..., k], and logarithms of shares float32 [..., k + 1], the rest's at the end.
    """
    count = min(count, logits.shape[-1] - 1)
    logs = functional.log_softmax(logits.float() / heat, -1)
    best, tokens = logs.topk(count, -1)
    return tokens.int(), torch.cat([best, _rest(logs, tokens)], -1)


def top_divergence(
    logits: torch.Tensor, tokens: torch.Tensor, shares: torch.Tensor, heat: float
) -> torch.Tensor:
    """:func:`divergence` of k + 1 outcomes: a teacher's likeliest tokens, and all others.

    Args:
        logits: of the student, float32 [positions, vocabulary].
        tokens, shares: [positions, k] and [positions, k + 1] from :func:`top_shares`, of the same
            temperature.
    """
    logs = functional.log_softmax(logits / heat, -1)
    chosen = tokens.long()
    mine = torch.cat([logs.gather(-1, chosen), _rest(logs, chosen)], -1)
    apart = functional.kl_div(mine, shares, reduction="sum", log_target=True)
    return apart * heat**2


def _rest(logs: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Logarithm of the share [..., 1] of all tokens but some.

    Summed up rather than taken from 1, where next to nothing would be left of a small one; and
    bounded below, so that a teacher without a doubt has a finite divergence.
    """
    others = logs.scatter(-1, tokens.long(), -torch.inf)
    return others.logsumexp(-1, keepdim=True).clamp_min(-80.0)
