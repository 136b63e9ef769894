"""The loss of a model from the hidden states that left its last block, in small pieces."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from compress.errors import CompressError
from compress.models.anatomy import Anatomy
from compress.models.halves import tail_logits
from compress.models.heads import head_of

IGNORED = -100  # target of a position that does not count, as in transformers
_REPLACED = 0.15  # share of the tokens that a masked model is asked for
_LOGIT_BYTES = 16 * 2**20  # of one piece; the loss needs as much again


@dataclass(frozen=True)
class LossBatch:
    """Model inputs and, for each position [batch, length], the token to be predicted there; for a
    head of labels the label of each row [batch]."""

    inputs: dict[str, torch.Tensor]
    targets: torch.Tensor


def loss_batch(
    model: nn.Module, batch: dict[str, torch.Tensor], generator: torch.Generator
) -> LossBatch:
    """Make targets for a calibration batch.

    Causal models predict the next token. Masked ones predict the labels of the batch or, where it
    has none, 15 % of the tokens, with random ones in their place: what the mask token is, a model
    does not say. A head of labels predicts the labels of the batch.

    Args:
        generator: on the CPU; decides what is replaced.

    Raises:
        CompressError: the model has no such head, or needs labels that the batch does not have.
    """
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    labels = batch.get("labels")
    if head_of(model) is not None:
        if labels is None:
            raise CompressError(
                "a label for each calibration input, to tell what a block is worth", "none",
                "Calibrate on `examples`, or give batches with `labels`",
            )  # fmt: skip
        return LossBatch(inputs, labels)
    ids = batch["input_ids"]
    if labels is not None and labels.shape != ids.shape:
        labels = None  # of sequences, not of tokens
    kind = type(model).__name__
    bidirectional = getattr(model.config, "is_causal", None) is False
    if kind.endswith(("ForCausalLM", "LMHeadModel")) and not bidirectional:
        targets = functional.pad(_real(batch, ids if labels is None else labels)[:, 1:], (0, 1))
        targets[:, -1] = IGNORED
        return LossBatch(inputs, targets)
    if not kind.endswith("ForMaskedLM") and not bidirectional:
        raise CompressError(
            "a model with a head, whose loss tells what a block is worth",
            kind,
            "Use shortgpt, which looks at hidden states only",
        )
    if labels is not None:
        return LossBatch(inputs, _real(batch, labels))
    chosen = (torch.rand(ids.shape, generator=generator) < _REPLACED).to(ids.device)
    vocabulary = model.config.vocab_size
    random = torch.randint(vocabulary, ids.shape, generator=generator).to(ids.device)
    inputs["input_ids"] = torch.where(chosen, random, ids)
    return LossBatch(inputs, _real(batch, ids).masked_fill(~chosen, IGNORED))


def _real(batch: dict[str, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
    """Targets without padding."""
    mask = batch.get("attention_mask")
    return targets if mask is None else targets.masked_fill(mask == 0, IGNORED)


def tail_loss(
    model: nn.Module, anatomy: Anatomy, batch: LossBatch, hidden: torch.Tensor
) -> tuple[float, int]:
    """Sum of losses (of a language model, negative log-likelihoods) and the number of targets.

    All that follows the blocks of a language model (final norm, head, soft caps) treats every
    position by itself, so the model's own forward can be given a few positions at a time.

    Args:
        hidden: [batch, length, hidden size], out of the last block.
    """
    head = head_of(model)
    if head is not None:
        with torch.no_grad():
            logits = tail_logits(model, anatomy, batch.inputs, hidden)
        losses = head.losses(logits, batch.targets)
        return float(losses.double().sum()), len(losses)
    rows, length = batch.targets.shape
    vocabulary = model.get_output_embeddings().weight.shape[0]
    span = max(1, _LOGIT_BYTES // (4 * vocabulary * rows))
    total, count = 0.0, 0
    for start in range(0, length, span):
        piece = slice(start, min(start + span, length))
        targets = batch.targets[:, piece]
        if not bool((targets != IGNORED).any()):
            continue
        inputs = {
            k: v[:, piece] if v.shape[:2] == (rows, length) else v for k, v in batch.inputs.items()
        }
        with torch.no_grad():
            logits = tail_logits(model, anatomy, inputs, hidden[:, piece])
        losses = functional.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none"
        )
        total += float(losses.double().sum())
        count += int((targets != IGNORED).sum())
    return total, count
