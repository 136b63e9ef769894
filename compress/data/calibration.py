"""Calibration batches: windows of text or images as tokens, masked for models that fill masks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig

from compress.data.framing import Frame, frame_for, is_masked_lm, pad_rows, with_note
from compress.data.labelled import load_rows, rows_digest
from compress.data.processor import ImageProcessor
from compress.data.text import Text, load_text
from compress.data.tokens import (
    check_ids,
    check_tokenizer,
    document_tokens,
    token_digest,
    token_stream,
    token_windows,
)
from compress.errors import CompressError
from compress.generators import MaskedGeneration, corrupt, mask_ratios
from compress.generators.description import is_masked_generator
from compress.generators.masking import mask_tokens
from compress.models.heads import head_of
from compress.models.inputs import LABELS
from compress.models.positions import positions_of

if TYPE_CHECKING:
    from compress.data.calibration_spec import CalibrationSpec
    from compress.data.codebook import Codebook
    from compress.data.examples import Examples
    from compress.data.images import Images

STRATIFIED = "stratified"
PLAIN_RATIO = 0.15  # what BERT and its kin were trained with


@dataclass(frozen=True)
class Calibration:
    """Batches of model inputs, and what a report says of them.

    Attributes:
        batches: ``{"input_ids": [batch, length]}``, with ``attention_mask`` where rows are padded
            (documents), and ``token_type_ids`` where the model tells two texts apart; of a model
            that reads images ``{"pixel_values": [batch, channels, height, width]}``. Masked
            models also get ``labels`` aside, in ``labels`` (-100 where nothing was masked), and so
            do models with a head of labels.
        text: where the tokens come from; None for images and examples.
        digest: sha256 of the input ids.
        tokens: how many, special ones included, padding left out.
        images, examples: where the tokens come from, instead of a text.
        frame: the special tokens around each sequence of text.
    """

    batches: list[dict[str, torch.Tensor]]
    labels: list[torch.Tensor] | None
    text: Text | None
    digest: str
    tokens: int
    images: Images | None = None
    frame: Frame = Frame()
    examples: Examples | None = None

    @property
    def description(self) -> str:
        """One line for a report: the source, what is special about it, special tokens."""
        return with_note((self.text or self.images or self.examples).description, self.frame)

    @property
    def bytes(self) -> int:
        """Of the text in UTF-8, or of the pixels at one byte each."""
        if self.images is not None:
            return self.images.pixels.numel()
        return (self.text or self.examples).bytes


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

    Each sequence has the special tokens around it that the model was trained to see
    (:func:`compress.data.framing.frame_for`); ``spec.length`` counts them.

    Args:
        reader: the model's tokenizer, its codebook for images as tokens, or its image processor.

    Raises:
        CompressError: no tokenizer or codebook or one of another model, a text that is empty or too
            short, too few images or examples, a length beyond the model's positions, examples for a
            model without a head of labels or with other labels.
    """
    if spec.examples is not None:
        return _labelled(spec, reader, config, seed, data_root)
    text = images = None
    frame = Frame()
    if spec.images is not None:
        images, windows = _image_rows(spec, reader, config, seed, data_root)
        ids, attention = windows, torch.ones_like(windows)
        fixed = torch.zeros(ids.shape, dtype=torch.bool)
    else:
        text, frame, rows = _text_rows(spec, reader, config, seed, data_root)
        ids, attention = pad_rows([frame.around(row) for row in rows], _padding(reader))
        fixed, _ = pad_rows([frame.positions(len(row) + len(frame)) for row in rows], True)
    ids, labels = _masked(spec.mask_ratio, ids, fixed, reader, config, seed)
    return Calibration(
        _batches(ids, attention, spec.batch),
        _labels(labels, attention, spec.batch),
        text,
        token_digest(ids if bool(attention.all()) else torch.stack([ids, attention])),
        int(attention.sum()),
        images,
        frame,
    )


def _labelled(
    spec: CalibrationSpec, reader: Any, config: PreTrainedConfig, seed: int, data_root: Any
) -> Calibration:
    """Labelled texts or images, a sample each, in the order that the selection gives."""
    check_length(spec, config)
    head = head_of(config)
    # The head of the data is enough for its first samples.
    few = spec.selection == "head" and spec.examples.part == "all"
    wanted = min(spec.samples, spec.examples.limit or spec.samples)
    asked = spec.examples.model_copy(update={"limit": wanted}) if few else spec.examples
    examples, rows = load_rows(asked, head, reader, config, spec.length, data_root)
    if len(rows) < spec.samples:
        raise CompressError(
            f"at least {spec.samples} examples", f"{len(rows)} ({examples.description})",
            "Lower calibration.samples",
        )  # fmt: skip
    chosen = torch.arange(spec.samples)
    if spec.selection == "random":
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(rows), generator=generator)[: spec.samples]
    batches = [rows.get(part) for part in chosen.split(spec.batch)]
    labels = [batch.pop(LABELS) for batch in batches]
    return Calibration(
        batches, labels, None, rows_digest(rows.chosen(chosen)), int(rows.lengths[chosen].sum()),
        examples=examples,
    )  # fmt: skip


def check_length(spec: CalibrationSpec, config: PreTrainedConfig) -> None:
    """Refuse texts that are longer than the model's positions."""
    positions = positions_of(config)
    if spec.images is None and positions and spec.length > positions:
        raise CompressError(
            f"calibration.length of at most {positions}, the model's positions",
            str(spec.length),
            "Lower it",
        )


def check_kind(spec: CalibrationSpec, reader: Any) -> None:
    """Refuse images for a tokenizer, and texts for a codebook."""
    if spec.images is not None and not callable(getattr(reader, "rows", None)):
        raise CompressError(
            "calibration.text or examples for a model that reads text",
            "calibration.images, without a codebook beside the model",
            "Images need the codebook.safetensors that the model was trained with",
        )
    if spec.examples is not None and isinstance(reader, ImageProcessor):
        return  # whether the model reads images shows when they are read
    if spec.images is None and not callable(getattr(reader, "get_vocab", None)):
        raise CompressError(
            "calibration.images for a model whose tokens are patches of images",
            "calibration.text" if spec.text is not None else "calibration.examples",
            "Name the images that the model was trained on",
        )


def _batches(
    ids: torch.Tensor, attention: torch.Tensor, size: int
) -> list[dict[str, torch.Tensor]]:
    """Batches padded to their own longest row; without a mask where all rows are that long."""
    batches = []
    for part, seen in zip(ids.split(size), attention.split(size), strict=True):
        longest = int(seen.sum(dim=1).max())
        batch = {"input_ids": part[:, :longest]}
        if not bool(seen[:, :longest].all()):
            batch["attention_mask"] = seen[:, :longest]
        batches.append(batch)
    return batches


def _labels(
    labels: torch.Tensor | None, attention: torch.Tensor, size: int
) -> list[torch.Tensor] | None:
    """Labels of the batches, cut as these are."""
    if labels is None:
        return None
    pairs = zip(labels.split(size), attention.split(size), strict=True)
    return [part[:, : int(seen.sum(dim=1).max())] for part, seen in pairs]


def _padding(tokenizer: Any) -> int:
    """What stands behind the end of a row; no model sees it."""
    found = getattr(tokenizer, "pad_token_id", None)
    return 0 if found is None else found


def _text_rows(
    spec: CalibrationSpec, reader: Any, config: PreTrainedConfig, seed: int, data_root: Any
) -> tuple[Text, Frame, list[torch.Tensor]]:
    """The text, what stands around its sequences, and these, int64 [n] each."""
    check_length(spec, config)
    check_kind(spec, reader)
    check_tokenizer(reader, config)
    documents = spec.packing == "documents"
    frame = frame_for(config, reader, special_tokens=spec.special_tokens, documents=documents)
    length = spec.length - len(frame)
    if length < 1:
        raise CompressError(
            f"calibration.length above {len(frame)}, the special tokens around each sequence",
            str(spec.length), "Raise it, or set calibration.special_tokens to false",
        )  # fmt: skip
    text = load_text(spec.text, data_root, tokenizer=reader)
    if documents:
        rows = _documents(spec, text, reader, config, length, seed)
    else:
        limit = spec.samples * length if spec.selection == "head" else None
        stream = token_stream(text, reader, limit)
        rows = list(
            token_windows(
                stream, samples=spec.samples, length=length, selection=spec.selection, seed=seed
            )
        )
    check_ids(torch.cat(rows), config)
    return text, frame, rows


def _documents(
    spec: CalibrationSpec,
    text: Text,
    tokenizer: Any,
    config: PreTrainedConfig,
    length: int,
    seed: int,
) -> list[torch.Tensor]:
    """A document a row, cut to ``length``; those with nothing but special tokens are left out."""
    special = torch.tensor(sorted(tokenizer.all_special_ids), dtype=torch.int64)
    rows = []
    for ids in document_tokens(text, tokenizer, length):
        if not bool(torch.isin(ids, special).all()):
            rows.append(ids)
        if len(rows) == spec.samples and spec.selection == "head":
            break
    if len(rows) < spec.samples:
        raise CompressError(
            f"at least {spec.samples} documents, a sample each (calibration.packing)",
            f"{len(rows)} in {text.description}",
            "Lower calibration.samples, or set packing to stream",
        )
    if spec.selection == "head":
        return rows
    generator = torch.Generator().manual_seed(seed)
    return [rows[i] for i in torch.randperm(len(rows), generator=generator)[: spec.samples]]


def _image_rows(
    spec: CalibrationSpec, reader: Codebook, config: PreTrainedConfig, seed: int, data_root: Any
) -> tuple[Images, torch.Tensor]:
    from compress.data.images import load_images

    check_kind(spec, reader)
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
    ids: torch.Tensor,
    fixed: torch.Tensor,
    reader: Any,
    config: PreTrainedConfig,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Masked rows and labels; the rows themselves where the model reads clean inputs.

    Args:
        fixed: bool like ``ids``, what is never masked: special tokens around a text, padding.
    """
    generates = is_masked_generator(config)
    if ratio is None:
        ratio = STRATIFIED if generates else PLAIN_RATIO
    if ratio == 0 or not (generates or is_masked_lm(config)):
        return ids, None
    generator = torch.Generator().manual_seed(seed)
    if ratio == STRATIFIED:
        ratio = mask_ratios(len(ids), generator=generator, shuffle=True)
    if generates:
        spec = MaskedGeneration.of(config)
        return corrupt(ids, spec, ratio, generator, fixed, law="exact")
    mask = getattr(reader, "mask_token_id", None)
    if mask is None:
        raise CompressError(
            "a tokenizer with a mask token for a masked language model",
            "none",
            "Set calibration.mask_ratio to 0 to calibrate on unmasked text",
        )
    return mask_tokens(ids, mask, reader.all_special_ids, ratio, generator, fixed=fixed)
