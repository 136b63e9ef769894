"""What a model is trained on: a text, images or labelled examples, turned into what it reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from compress.data.codebook import fit_codebook
from compress.data.examples import Examples, load_examples
from compress.data.framing import Frame, frame_for, pad_rows
from compress.data.images import Images, load_images
from compress.data.labelled import labelled_rows
from compress.data.processor import FILE, ImageProcessor
from compress.data.text import Text, load_text
from compress.data.tokens import document_tokens, token_stream
from compress.errors import CompressError
from compress.generators.description import is_masked_generator
from compress.models.heads import Head
from compress.models.sources.source import load_config, load_tokenizer
from compress.train import BatchSource
from compress.train.create.spec import TrainSpec
from compress.train.create.tokenizer import make_tokenizer

_NOTHING = Frame()


class Windows:
    """Sequences of one length in memory, one tensor a name; a compress.train.BatchSource.

    Args:
        frame: put around ``input_ids`` when they are asked for.
        tensors: name -> [n, ...] integer tensors; views cost no memory.
    """

    def __init__(self, frame: Frame = _NOTHING, **tensors: torch.Tensor) -> None:
        self.frame, self.tensors = frame, tensors

    def __len__(self) -> int:
        return len(self.tensors["input_ids"])

    def get(self, indices: torch.Tensor) -> dict[str, torch.Tensor]:
        batch = {name: tensor[indices].long() for name, tensor in self.tensors.items()}
        return {**batch, "input_ids": self.frame.around(batch["input_ids"])}


@dataclass(frozen=True)
class Material:
    """Training examples and what makes tokens of such data.

    Attributes:
        rows: ``input_ids`` [n, length], with ``attention_mask`` where rows are padded, and
            ``labels`` of labelled texts.
        reader: the tokenizer, the codebook, or the image processor.
    """

    rows: BatchSource
    reader: Any


def read_data(
    spec: TrainSpec, data_root: str | Path | None, adapted: Path | None = None
) -> Text | Images | Examples:
    """The text, the images or the labelled texts that the section names.

    Args:
        adapted: folder of the model that ``from`` names, whose chat template may be needed.

    Raises:
        CompressError: data that is missing or does not fit the section.
    """
    if spec.examples is not None:
        return load_examples(spec.examples, data_root)
    if spec.images is None:
        tokenizer = None if adapted is None else load_tokenizer(adapted)[0]
        return load_text(spec.text, data_root, tokenizer=tokenizer)
    images = load_images(spec.images, data_root)
    if images.classes > spec.images.classes:
        raise CompressError(
            f"at most {spec.images.classes} classes (model.train.images.classes)",
            f"{images.classes} in {images.description}", "Raise it",
        )  # fmt: skip
    return images


def prepare(
    spec: TrainSpec,
    data: Text | Images | Examples,
    adapted: Path | None,
    seed: int,
    frame: Frame = _NOTHING,
    head: Head | None = None,
    config: PreTrainedConfig | None = None,
) -> Material:
    """Fit the tokenizer or the codebook on the data, and make rows of it.

    Args:
        adapted: folder of the model that ``from`` names, whose tokenizer is used.
        frame: what stands around each sequence of text (:func:`frame_of`).
        head, config: of the model that learns labels.

    Raises:
        CompressError: a text that is too short, a patch that does not divide the images.
    """
    if isinstance(data, Images):
        wanted = spec.images
        codebook = fit_codebook(data, wanted.sides, wanted.codes, wanted.classes, seed)
        return Material(Windows(input_ids=codebook.rows(data).to(torch.int32)), codebook)
    tokenizer = reader_for(data, adapted) or _tokenizer(spec, data, adapted)
    if isinstance(data, Examples):
        return Material(labelled_rows(data, head, tokenizer, config, spec.length), tokenizer)
    pack = _stream if spec.packing == "stream" else _documents
    return Material(pack(spec, data, tokenizer, frame), tokenizer)


def frame_of(spec: TrainSpec, adapted: Path | None) -> Frame:
    """What stands around each sequence of text: nothing for a tokenizer that the recipe makes."""
    if adapted is None or spec.text is None:
        return _NOTHING
    config = load_config(adapted)
    masked = "generator" if is_masked_generator(config) else "masked"
    return frame_for(
        config,
        tokenizer_of(adapted),
        special_tokens=spec.special_tokens,
        documents=spec.packing == "documents",
        kind=masked if spec.objective.kind == "masked" else "causal",
    )


def _tokenizer(spec: TrainSpec, data: Text | Examples, adapted: Path | None) -> Any:
    if adapted is not None:
        return tokenizer_of(adapted)
    labelled = isinstance(data, Examples)
    documents = (*data.texts, *(data.pairs or ())) if labelled else data.documents
    return make_tokenizer(spec.tokenizer, documents, spec.length, ends=labelled)


def reader_for(data: Any, folder: Path | None) -> ImageProcessor | None:
    """The image processor of the model that is adapted, where images are learned from.

    Raises:
        CompressError: there is none.
    """
    if folder is None or not (isinstance(data, Examples) and data.images):
        return None
    found = ImageProcessor.of_folder(folder)
    if found is None:
        raise CompressError(
            f"{FILE} beside the model to adapt", "none", "Add the file, or one of a like model"
        )
    return found


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer beside the model that is adapted.

    Raises:
        CompressError: there is none.
    """
    tokenizer, reason = load_tokenizer(folder)
    if tokenizer is None:
        raise CompressError("a tokenizer beside the model to adapt", reason, "Add its files")
    return tokenizer


def _room(spec: TrainSpec, frame: Frame) -> int:
    """Tokens of text in a sequence."""
    if spec.length - len(frame) < 1:
        raise CompressError(
            f"model.train.length above {len(frame)}, the special tokens of each sequence",
            str(spec.length), "Raise it, or set model.train.special_tokens to false",
        )  # fmt: skip
    return spec.length - len(frame)


def _stream(spec: TrainSpec, text: Text, tokenizer: Any, frame: Frame) -> Windows:
    """Every window of the text: an example may start at any token."""
    stream, length = token_stream(text, tokenizer), _room(spec, frame)
    if len(stream) < length:
        raise CompressError(
            f"a training text of at least one sequence ({length} tokens)",
            f"{len(stream)} tokens", "Lower model.train.length or choose a longer text",
        )  # fmt: skip
    return Windows(frame, input_ids=stream.to(torch.int32).unfold(0, length, 1))


def _documents(spec: TrainSpec, text: Text, tokenizer: Any, frame: Frame) -> Windows:
    """A row a document, cut to the length and padded to the longest."""
    if tokenizer.pad_token_id is None:
        raise CompressError("a tokenizer with a padding token", "none", "Set packing: stream")
    found = [frame.around(ids) for ids in document_tokens(text, tokenizer, _room(spec, frame))]
    if not found:
        raise CompressError("tokens from the text", "none", "The tokenizer does not know this text")
    ids, mask = pad_rows([row.to(torch.int32) for row in found], tokenizer.pad_token_id)
    return Windows(input_ids=ids, attention_mask=mask.to(torch.int8))
