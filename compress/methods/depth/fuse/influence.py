"""Macro Influence: how much the last hidden states of a model miss one of its blocks."""

from __future__ import annotations

import math

from torch.nn import functional

from compress.methods.work import BlockSurvey


def macro_influence(survey: BlockSurvey) -> dict[int, float] | None:
    """1 - E[cos(H, H_i)] over tokens, of each block i: 0 for one that nothing depends on.

    H are the hidden states that leave the last block (before the final norm), H_i those of the
    model without block i (Pei et al. 2024, FuseGPT, arXiv 2411.14507). Padding counts for nothing.

    Args:
        survey: of a block, with detours around the blocks in question.

    Returns:
        None of any block but the last. Infinity for a block whose absence makes states that are no
        numbers.
    """
    if not survey.last:
        return None
    found = {}
    for index, detour in survey.detours.items():
        total, tokens = 0.0, 0
        for batch, states in enumerate(detour):
            call = survey.calls[batch]
            whole = call.tokens(survey.outputs.read(batch))
            cosine = functional.cosine_similarity(whole, call.tokens(states), dim=-1)
            total, tokens = total + float(cosine.double().sum()), tokens + cosine.numel()
        found[index] = 1 - total / tokens
    return {i: value if math.isfinite(value) else math.inf for i, value in found.items()}
