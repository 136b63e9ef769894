"""Calibration batches: windows of text or images as tokens, masked for models that fill masks."""

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
from compress.masked import MaskedGeneration, corrupt, mask_ratios
from compress.masked.description import is_masked_generator

if TYPE_CHECKING:
    from compress.data.codebook import Codebook
    from compress.data.images import Images
    from compress.recipe import CalibrationSpec

STRATIFIED = "stratified"
PLAIN_RATIO = 0.15  # what BERT and its kin were trained with


@dataclass(frozen=True)
class Calibration:
    """Batches of model inputs, and what a report says of them.

    Attributes:
        batches: ``{"input_ids": [batch, length]}``; masked models also get ``labels`` aside, in
            ``labels`` (-100 where nothing was masked).
        text: where the tokens come from; None for images.
        digest: sha256 of the input ids.
        tokens: how many.
        images: where the tokens come from, instead of a text.
    """

    batches: list[dict[str, torch.Tensor]]
    labels: list[torch.Tensor] | None
    text: Text | None
    digest: str
    tokens: int
    images: Images | None = None

    @property
    def description(self) -> str:
        """One line for a report: the source and what is special about it."""
        return (self.text or self.images).description

    @property
    def bytes(self) -> int:
        """Of the text in UTF-8, or of the pixels at one byte each."""
        return self.images.pixels.numel() if self.text is None else self.text.bytes


def calibration_batches(
    spec: CalibrationSpec,
    reader: Any,
    config: PreTrainedConfig,
    *,
    seed: int = 0,
    data_root: str | Path | None = None,
) -> Calibration:
    """Read the calibration data and cut it into batches.

    Models that fill masks see masked inputs (always the mask token). Masked generators, which meet
    every share of masks when they sample, see shares spread evenly over (0, 1]: statistics of clean
    inputs alone would say nothing of the first steps of sampling.

    Args:
        reader: the model's tokenizer, or its codebook for images.

    Raises:
        CompressError: no tokenizer or codebook or one of another model, a text that is empty or too
            short, too few images, a length beyond the model's positions.
    """
    text = images = None
    if spec.images is not None:
        images, windows = _image_rows(spec, reader, config, seed, data_root)
    else:
        text, windows = _text_windows(spec, reader, config, seed, data_root)
    windows, labels = _masked(spec.mask_ratio, windows, reader, config, seed)
    batches = [{"input_ids": part} for part in windows.split(spec.batch)]
    return Calibration(
        batches,
        list(labels.split(spec.batch)) if labels is not None else None,
        text,
        token_digest(windows),
        windows.numel(),
        images,
    )


def is_masked_lm(config: PreTrainedConfig) -> bool:
    """True for checkpoints of a masked language model."""
    return any(a.endswith("ForMaskedLM") for a in config.architectures or [])


def _text_windows(
    spec: CalibrationSpec, reader: Any, config: PreTrainedConfig, seed: int, data_root: Any
) -> tuple[Text, torch.Tensor]:
    positions = getattr(config, "max_position_embeddings", None)
    if positions and spec.length > positions > 1:
        raise CompressError(
            f"calibration.length of at most {positions}, the model's positions",
            str(spec.length),
            "Lower it",
        )
    if not callable(getattr(reader, "get_vocab", None)):
        raise CompressError(
            "calibration.images for a model whose tokens are patches of images",
            "calibration.text",
            "Name the images that the model was trained on",
        )
    check_tokenizer(reader, config)
    text = load_text(spec.text, data_root)
    limit = spec.samples * spec.length if spec.selection == "head" else None
    stream = token_stream(text, reader, limit)
    check_ids(stream, config)
    return text, token_windows(
        stream, samples=spec.samples, length=spec.length, selection=spec.selection, seed=seed
    )


def _image_rows(
    spec: CalibrationSpec, reader: Codebook, config: PreTrainedConfig, seed: int, data_root: Any
) -> tuple[Images, torch.Tensor]:
    from compress.data.images import load_images

    if not callable(getattr(reader, "rows", None)):
        raise CompressError(
            "calibration.text for a model that reads text",
            "calibration.images, without a codebook beside the model",
            "Images need the codebook.safetensors that the model was trained with",
        )
    images = load_images(spec.images, data_root)
    if len(images) < spec.samples:
        raise CompressError(
            f"at least {spec.samples} images",
            f"{len(images)} ({images.description})",
            "Lower calibration.samples",
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.arange(spec.samples)
    if spec.selection == "random":
        chosen = torch.randperm(len(images), generator=generator)[: spec.samples]
    rows = reader.rows(images)[chosen]
    check_ids(rows.flatten(), config)
    return images, rows


def _masked(
    ratio: torch.Tensor | float | str | None,
    windows: torch.Tensor,
    reader: Any,
    config: PreTrainedConfig,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Masked windows and labels; the windows themselves where the model reads clean inputs."""
    generates = is_masked_generator(config)
    if ratio is None:
        ratio = STRATIFIED if generates else PLAIN_RATIO
    if ratio == 0 or not (generates or is_masked_lm(config)):
        return windows, None
    generator = torch.Generator().manual_seed(seed)
    if ratio == STRATIFIED:
        ratio = mask_ratios(len(windows), generator=generator, shuffle=True)
    if generates:
        spec = MaskedGeneration.of(config)
        return corrupt(windows, spec, ratio, generator, law="exact")
    mask = getattr(reader, "mask_token_id", None)
    if mask is None:
        raise CompressError(
            "a tokenizer with a mask token for a masked language model",
            "none",
            "Set calibration.mask_ratio to 0 to calibrate on unmasked text",
        )
    return mask_tokens(windows, mask, reader.all_special_ids, ratio, generator)
