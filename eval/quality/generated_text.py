"""How generated text reads: perplexity under another model, and how varied it is.

Generative perplexity alone is cheated by repetition, so unigram entropy always stands beside it
(Zheng et al. 2024, https://arxiv.org/abs/2409.02908, section 4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import LongTensor, nn

from compress.errors import CompressError
from compress.eval.quality.stats import clustered_mean
from compress.models.kind import require_causal
from compress.models.positions import positions_of
from compress.models.split_forward import SplitForward

WHERE = "generative perplexity"
LONGEST = 1024  # tokens of a sample that are scored


@dataclass(frozen=True)
class Scorer:
    """A causal language model that judges text.

    Attributes:
        name: where it came from; the figure is called genPPL(<name>).
        model: any causal language model.
        tokenizer: its own.
    """

    name: str
    model: nn.Module
    tokenizer: Any


def generative_perplexity(scorer: Scorer, texts: Sequence[str]) -> tuple[float, float | None, int]:
    """Score samples with a model that did not make them.

    exp of the mean over samples of the mean over tokens of -log p (Sahoo et al. 2024, MDLM,
    https://arxiv.org/abs/2406.07524, section 5.1). The first token of a sample is scored where the
    scorer's tokenizer has a token to begin with, else it is context.

    Returns:
        The mean in nats per token, its standard error over samples, and how many samples had
        anything to score (two tokens or more).

    Raises:
        CompressError: a scorer that is not causal, or no sample with two tokens.
    """
    require_causal(scorer.model, WHERE)
    positions = positions_of(scorer.model.config) or LONGEST
    begin = scorer.tokenizer.bos_token_id
    means = []
    with torch.no_grad(), SplitForward(scorer.model) as split:
        for text in texts:
            ids = scorer.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            ids = ([] if begin is None else [begin]) + list(ids)
            row = torch.tensor([ids[: min(LONGEST, positions)]], device=scorer.model.device)
            if row.shape[1] >= 2:
                hidden = split.hidden(input_ids=row[:, :-1])[0]
                means.append(split.nll(hidden, row[0, 1:]).double().mean().item())
    if not means:
        raise CompressError("samples with at least two tokens of the scorer", "none", where=WHERE)
    mean, error = clustered_mean(means, [1.0] * len(means))
    return mean, error, len(means)


def unigram_entropy(tokens: LongTensor) -> float:
    """Mean over samples [n, length] of the entropy of a sample's token frequencies, in nats.

    At most log(length); near zero where a sample repeats one token.
    """
    return sum(_entropy(row) for row in tokens) / len(tokens)


def _entropy(row: LongTensor) -> float:
    shares = row.unique(return_counts=True)[1].double() / len(row)
    return -math.fsum(p * math.log(p) for p in shares.tolist())
