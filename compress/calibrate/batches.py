"""Calibration batches: windows of tokens, masked for masked language models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig

from compress.data.masking import mask_tokens
from compress.data.text import Text, load_text
from compress.data.tokens import (
    check_ids,
    check_tokenizer,
    token_digest,
    token_stream,
    token_windows,
)
from compress.errors import CompressError

if TYPE_CHECKING:
    from compress.recipe import CalibrationSpec


@dataclass(frozen=True)
class Calibration:
    """Batches of model inputs, and what a report says of them.

    Attributes:
        batches: ``{"input_ids": [batch, length]}``; masked models also get ``labels`` aside, in
            ``labels`` (-100 where nothing was masked).
        text: where the tokens come from.
        digest: sha256 of the input ids.
        tokens: how many.
    """

    batches: list[dict[str, torch.Tensor]]
    labels: list[torch.Tensor] | None
    text: Text
    digest: str
    tokens: int


def calibration_batches(
    spec: CalibrationSpec,
    tokenizer: Any,
    config: PreTrainedConfig,
    *,
    seed: int = 0,
    data_root: str | Path | None = None,
) -> Calibration:
    """Read the calibration text and cut it into batches.

    Raises:
        CompressError: no tokenizer or one of another model, a text that is empty or too short, a
            length beyond the model's positions.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if positions and spec.length > positions > 1:
        raise CompressError(
            f"calibration.length of at most {positions}, the model's positions",
            str(spec.length),
            "Lower it",
        )
    check_tokenizer(tokenizer, config)
    text = load_text(spec.text, data_root)
    limit = spec.samples * spec.length if spec.selection == "head" else None
    stream = token_stream(text, tokenizer, limit)
    check_ids(stream, config)
    windows = token_windows(
        stream, samples=spec.samples, length=spec.length, selection=spec.selection, seed=seed
    )
    labels = None
    if is_masked_lm(config) and spec.mask_ratio > 0:
        windows, labels = _masked(windows, spec.mask_ratio, tokenizer, seed)
    batches = [{"input_ids": part} for part in windows.split(spec.batch)]
    return Calibration(
        batches,
        list(labels.split(spec.batch)) if labels is not None else None,
        text,
        token_digest(windows),
        windows.numel(),
    )


def is_masked_lm(config: PreTrainedConfig) -> bool:
    """True for checkpoints of a masked language model."""
    return any(a.endswith("ForMaskedLM") for a in config.architectures or [])


def _masked(
    windows: torch.Tensor, ratio: float, tokenizer: Any, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    if getattr(tokenizer, "mask_token_id", None) is None:
        raise CompressError(
            "a tokenizer with a mask token for a masked language model",
            "none",
            "Set calibration.mask_ratio to 0 to calibrate on unmasked text",
        )
    generator = torch.Generator().manual_seed(seed)
    return mask_tokens(
        windows, tokenizer.mask_token_id, tokenizer.all_special_ids, ratio, generator
    )
