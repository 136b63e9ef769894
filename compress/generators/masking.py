"""Masked inputs for masked language models.

Devlin et al. 2019, BERT (https://arxiv.org/abs/1810.04805), section 3.1: of the positions chosen,
80 % become the mask token, 10 % a random token, 10 % stay; the model is asked for all of them.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from compress.errors import CompressError

IGNORE = -100  # the label that the losses of torch and transformers leave out


def mask_tokens(
    ids: torch.Tensor,
    mask_id: int,
    special_ids: Collection[int],
    ratio: float | torch.Tensor,
    generator: torch.Generator,
    *,
    vocab_size: int | None = None,
    fixed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask a share of the tokens of each row.

    Each row gets the same share of its eligible positions (at least one), drawn without
    replacement: a fixed number has less noise than BERT's independent draws, and the same mean.

    Args:
        ids: int64 [rows, length].
        mask_id: the mask token.
        special_ids: tokens that are never chosen (padding, [CLS], [SEP], ...).
        ratio: the share of eligible positions to choose, in (0, 1]; a number, or one a row [rows].
        generator: the source of all randomness, on the CPU.
        vocab_size: if given, 10 % of the chosen become a random token below it that is not special
            and 10 % stay; if None, all of them become the mask token.
        fixed: bool [rows, length], more positions that are never chosen.

    Returns:
        inputs, labels: both int64 [rows, length]; labels are -100 where nothing was chosen.

    Raises:
        CompressError: a ratio out of range, or a row with nothing to mask.
    """
    ratios = torch.as_tensor(ratio, dtype=torch.float64)
    if not bool(((ratios > 0) & (ratios <= 1)).all()):
        raise CompressError("a masking ratio above 0 and at most 1", str(ratio))
    special = torch.tensor(sorted({*special_ids, mask_id}), dtype=ids.dtype, device=ids.device)
    eligible = ~torch.isin(ids, special)
    if fixed is not None:
        eligible &= ~fixed.to(ids.device)
    counts = eligible.sum(dim=1)
    if bool((counts == 0).any()):
        row = int((counts == 0).nonzero()[0])
        raise CompressError(
            "a token to mask in each row", f"row {row} of special tokens only", "Use longer texts"
        )
    wanted = (counts * ratios.to(ids.device)).round().clamp(min=1)
    scores = torch.rand(ids.shape, generator=generator).to(ids.device)
    scores = scores.masked_fill(~eligible, 2.0)  # behind all eligible positions
    rank = scores.argsort(dim=1).argsort(dim=1)
    chosen = rank < wanted[:, None]
    labels = ids.masked_fill(~chosen, IGNORE)
    masked = ids.masked_fill(chosen, mask_id)
    if vocab_size is None:
        return masked, labels
    return _replace_some(ids, masked, chosen, special, vocab_size, generator), labels


def _replace_some(
    ids: torch.Tensor,
    masked: torch.Tensor,
    chosen: torch.Tensor,
    special: torch.Tensor,
    vocab_size: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Of the chosen positions leave 10 % as they were and give 10 % a random ordinary token."""
    every = torch.arange(vocab_size, dtype=ids.dtype, device=ids.device)
    ordinary = every[~torch.isin(every, special)]
    draw = torch.rand(ids.shape, generator=generator).to(ids.device)
    picks = torch.randint(len(ordinary), ids.shape, generator=generator).to(ids.device)
    random_tokens = ordinary[picks]
    result = torch.where(chosen & (draw < 0.1), ids, masked)
    return torch.where(chosen & (draw >= 0.1) & (draw < 0.2), random_tokens, result)
