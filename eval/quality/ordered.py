"""The exact likelihood of decoding one token a step, where a rule says which is next.

A sampler that commits one token a step at a position chosen from the logits alone has a likelihood
in closed form: run its rule on the text with every choice forced to the true token, and sum. There
is no Monte Carlo noise, which makes it a sharp measure of what compression changed. The cost is one
network evaluation a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from compress.errors import CompressError, did_you_mean
from compress.eval.quality.denoising import WHERE, Denoise, Sequences
from compress.eval.quality.likelihood import LikelihoodResult, likelihood_result

Rule = Literal["confidence", "left-to-right", "margin", "entropy"]


def exact_ordered_nll(
    denoise: Denoise,
    data: Sequences,
    mask_id: int,
    rule: Rule = "confidence",
    *,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> LikelihoodResult:
    """Negative log-likelihood of ``data`` under ordered decoding, exactly.

    Args:
        rule: the next position is the one with the largest top probability (confidence), with the
            largest gap between the first two (margin), with the least entropy, or the first one.
            Of equal positions the first is taken.

    Raises:
        CompressError: an unknown rule, or a token that the denoiser may not produce.
    """
    if rule not in get_args(Rule):
        raise CompressError(
            "an order of decoding", repr(rule), did_you_mean(str(rule), list(get_args(Rule))),
            where=WHERE,
        )  # fmt: skip
    nats = torch.zeros(len(data), dtype=torch.float64)
    evaluations = 0
    done = 0
    for part, length in data.batches(batch_size):
        tokens, free = data.tokens[part, :length], data.free[part, :length]
        nats[part], used = _decode(denoise, tokens, free, mask_id, rule)
        evaluations += used
        done += len(part)
        if progress:
            progress(done, len(data))
    return likelihood_result(nats, data, rule=rule, evaluations=evaluations)


def _decode(
    denoise: Denoise, tokens: Tensor, free: Tensor, mask_id: int, rule: Rule
) -> tuple[Tensor, int]:
    """Nats of each row, float64 [rows], and the rows evaluated."""
    nats = torch.zeros(len(tokens), dtype=torch.float64)
    unknown, evaluations = free.clone(), 0
    while unknown.any():
        active = unknown.any(dim=1).nonzero()[:, 0]
        inputs = tokens[active].masked_fill(unknown[active], mask_id)
        logs = denoise(inputs).cpu().double().log_softmax(dim=-1)
        score = position_scores(logs, rule).masked_fill(~unknown[active], -torch.inf)
        position = score.argmax(dim=1)
        target = tokens[active, position]
        gained = logs[torch.arange(len(active)), position, target]
        if not torch.isfinite(gained).all():
            raise CompressError(
                "finite log-probabilities of tokens that the model may produce",
                f"{gained[~torch.isfinite(gained)][0].item()} for a token of the text",
                "Leave special tokens out of the text; check the weights for NaN",
                where=WHERE,
            )
        nats[active] -= gained
        unknown[active, position] = False
        evaluations += len(active)
    return nats, evaluations


def position_scores(logs: Tensor, rule: Rule) -> Tensor:
    """How soon each position is to be decoded: log-probabilities [..., N, V] to scores [..., N]."""
    if rule == "left-to-right":
        places = torch.arange(logs.shape[-2], dtype=logs.dtype)
        return (-places).expand(logs.shape[:-1])
    if rule == "confidence":
        return logs.amax(dim=-1)
    if rule == "margin":
        first, second = logs.exp().topk(2, dim=-1).values.unbind(-1)
        return first - second
    # 0 * -inf of tokens that may not be produced is nothing, not NaN.
    return torch.special.entr(logs.exp()).sum(dim=-1).neg()
