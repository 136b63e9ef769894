"""N:M masks for weights that will not be changed: what to drop so that the layer's output moves
least.

With d the weights dropped from a row (W - W * mask) and H the Gram matrix of the inputs, the row's
squared output error is d H d^T: a quadratic in the mask that one-shot scores only approximate
(magnitude: H = 1; Wanda: H diagonal; SparseGPT: kept weights may still move, which here they may
not).
"""

from __future__ import annotations

import torch

from compress.linear.pattern import Pattern
from compress.methods.sparsity.maskllm.soft import candidates


def local_search(
    weight: torch.Tensor,
    gram: torch.Tensor,
    mask: torch.Tensor,
    pattern: Pattern,
    sweeps: int = 4,
) -> torch.Tensor:
    """Improve a mask by coordinate descent: group after group takes the legal mask that is best
    given all others, until a sweep changes nothing.

    The error falls with every change, so the result is no worse than the mask it starts from.
    A sweep costs about as much as one product [out, in] x [in, in].

    Args:
        weight: W [out, in]. gram: X^T X [in, in].
        mask: bool [out, in], N kept in every M inputs. sweeps: at most so many passes.

    Returns:
        bool [out, in].
    """
    size = pattern.m
    dropped = (1 - candidates(pattern)).to(weight)  # [C, M]
    legal = candidates(pattern).to(weight.device).bool()
    choice = _indices(mask, pattern)  # [out, in / M]
    lost = weight * ~mask
    pull = lost @ gram  # gradient of the error, half of it
    for _ in range(sweeps):
        changed = False
        for group in range(weight.shape[1] // size):
            columns = slice(group * size, (group + 1) * size)
            inner, now = gram[columns, columns], lost[:, columns]
            outside = pull[:, columns] - now @ inner
            trials = weight[:, columns].unsqueeze(1) * dropped  # [out, C, M]
            error = ((trials @ inner + 2 * outside.unsqueeze(1)) * trials).sum(-1)
            best = error.argmin(1)
            current = choice[:, group]
            # Ties keep what is there, else equal masks could take turns for ever.
            gain = error.gather(1, current[:, None]) > error.gather(1, best[:, None])
            best = torch.where(gain[:, 0], best, current)
            if torch.equal(best, current):
                continue
            changed = True
            step = trials[torch.arange(len(weight), device=weight.device), best] - now
            pull += step @ gram[columns]
            lost[:, columns] += step
            choice[:, group] = best
        if not changed:
            break
    return legal[choice].reshape(weight.shape)


def _indices(mask: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Index of each group's mask among the candidates, [out, in / M]."""
    groups = mask.unflatten(1, (-1, pattern.m)).float()
    agreement = groups @ candidates(pattern).to(groups).t()
    return agreement.argmax(-1)
