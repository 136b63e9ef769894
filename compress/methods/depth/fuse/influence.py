"""Macro Influence: how much the last hidden states of a model miss one of its blocks."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import nn
from torch.nn import functional

from compress.methods.depth.trials import Trials
from compress.models.anatomy import Anatomy


def macro_influence(
    model: nn.Module,
    anatomy: Anatomy,
    batches: list[dict[str, torch.Tensor]],
    candidates: Collection[int],
) -> dict[int, float]:
    """1 - E[cos(H, H_i)] over tokens, of each candidate i: 0 for a block that nothing depends on.

    H are the hidden states that leave the last block (before the final norm), H_i those of the
    model without block i (Pei et al. 2024, FuseGPT, arXiv 2411.14507). Padding counts for nothing.

    Args:
        batches: of model inputs.

    Returns:
        Infinity for a block whose absence makes states that are no numbers.
    """
    trials, every = Trials(model, anatomy, batches), range(len(anatomy.blocks))
    similarity, tokens = dict.fromkeys(sorted(candidates), 0.0), 0
    for batch in range(len(batches)):
        call = trials.calls[-1][batch]
        whole = call.tokens(trials.through(every, batch))
        tokens += whole.shape[:-1].numel()
        for index, states in trials.without_each(every, similarity, batch):
            cosine = functional.cosine_similarity(whole, call.tokens(states), dim=-1)
            similarity[index] += float(cosine.double().sum())
    influence = {index: 1 - total / tokens for index, total in similarity.items()}
    return {i: value if math.isfinite(value) else math.inf for i, value in influence.items()}
