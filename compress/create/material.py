"""What a model is trained on: a text or images, turned into rows of token ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress.create.spec import TrainSpec
from compress.create.tokenizer import make_tokenizer
from compress.data.codebook import fit_codebook
from compress.data.images import Images, load_images
from compress.data.text import Text, load_text
from compress.data.tokens import token_stream
from compress.errors import CompressError
from compress.models.source import load_tokenizer

_DOCUMENTS_AT_ONCE = 4096


class Rows:
    """Examples in memory, one tensor a name; a compress.train.BatchSource.

    Args:
        tensors: name -> [n, ...] integer tensors; views cost no memory.
    """

    def __init__(self, **tensors: torch.Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors["input_ids"])

    def get(self, indices: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: tensor[indices].long() for name, tensor in self.tensors.items()}


@dataclass(frozen=True)
class Material:
    """Training examples and what makes tokens of such data.

    Attributes:
        rows: ``input_ids`` [n, length], with ``attention_mask`` where rows are padded.
        reader: the tokenizer, or the codebook.
    """

    rows: Rows
    reader: Any


def read_data(spec: TrainSpec, data_root: str | Path | None) -> Text | Images:
    """The text or the images that the section names.

    Raises:
        CompressError: data that is missing or does not fit the section.
    """
    if spec.images is None:
        return load_text(spec.text, data_root)
    images = load_images(spec.images, data_root)
    if images.classes > spec.images.classes:
        raise CompressError(
            f"at most {spec.images.classes} classes (model.train.images.classes)",
            f"{images.classes} in {images.description}", "Raise it",
        )  # fmt: skip
    return images


def prepare(spec: TrainSpec, data: Text | Images, adapted: Path | None, seed: int) -> Material:
    """Fit the tokenizer or the codebook on the data, and make rows of it.

    Args:
        adapted: folder of the model that ``from`` names, whose tokenizer is used.

    Raises:
        CompressError: a text that is too short, a patch that does not divide the images.
    """
    if isinstance(data, Images):
        wanted = spec.images
        codebook = fit_codebook(data, wanted.sides, wanted.codes, wanted.classes, seed)
        return Material(Rows(input_ids=codebook.rows(data).to(torch.int32)), codebook)
    tokenizer = _tokenizer(spec, data, adapted)
    pack = _stream if spec.packing == "stream" else _documents
    return Material(pack(spec, data, tokenizer), tokenizer)


def _tokenizer(spec: TrainSpec, text: Text, adapted: Path | None) -> Any:
    if adapted is None:
        return make_tokenizer(spec.tokenizer, text, spec.length)
    tokenizer, reason = load_tokenizer(adapted)
    if tokenizer is None:
        raise CompressError("a tokenizer beside the model to adapt", reason, "Add its files")
    return tokenizer


def _stream(spec: TrainSpec, text: Text, tokenizer: Any) -> Rows:
    """Every window of the text: an example may start at any token."""
    stream = token_stream(text, tokenizer)
    if len(stream) < spec.length:
        raise CompressError(
            f"a training text of at least one sequence ({spec.length} tokens)",
            f"{len(stream)} tokens", "Lower model.train.length or choose a longer text",
        )  # fmt: skip
    return Rows(input_ids=stream.to(torch.int32).unfold(0, spec.length, 1))


def _documents(spec: TrainSpec, text: Text, tokenizer: Any) -> Rows:
    """A row a document, cut to the length and padded to the longest."""
    if tokenizer.pad_token_id is None:
        raise CompressError("a tokenizer with a padding token", "none", "Set packing: stream")
    documents, ids = list(text.documents), []
    for start in range(0, len(documents), _DOCUMENTS_AT_ONCE):
        part = documents[start : start + _DOCUMENTS_AT_ONCE]
        encoded = tokenizer(part, truncation=True, max_length=spec.length, verbose=False)
        ids += [row for row in encoded["input_ids"] if row]
    if not ids:
        raise CompressError("tokens from the text", "none", "The tokenizer does not know this text")
    longest = max(map(len, ids))
    rows = torch.full((len(ids), longest), tokenizer.pad_token_id, dtype=torch.int32)
    mask = torch.zeros(len(ids), longest, dtype=torch.int8)
    for number, row in enumerate(ids):
        rows[number, : len(row)] = torch.tensor(row, dtype=torch.int32)
        mask[number, : len(row)] = 1
    return Rows(input_ids=rows, attention_mask=mask)
