"""Labelled texts and images as a model with a head of labels reads them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress.data.examples import Examples, load_examples
from compress.data.examples_spec import ExamplesSpec
from compress.data.labels import label_names, label_values
from compress.data.pictures import images_digest, in_channels, picture
from compress.data.processor import FILE, ImageProcessor
from compress.data.tokens import check_ids, check_tokenizer, token_digest
from compress.errors import CompressError
from compress.models.heads import Head
from compress.models.images import image_shape, image_tokens
from compress.models.inputs import IDS, IGNORED, LABELS, ImageRows, Rows
from compress.models.positions import positions_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LENGTH = 128  # tokens of an example at most, where nobody says
_TYPES = "token_type_ids"


def labelled_rows(
    examples: Examples, head: Head, tokenizer: Any, config: PreTrainedConfig, length: int | None
) -> Rows | ImageRows:
    """Tokens of the examples with the special ones that the tokenizer adds, or pixels, and their
    labels.

    Args:
        tokenizer: or the image processor, of a model that reads images.
        length: tokens of an example at most, special ones included; of a pair that is longer the
            longer text is cut. By default 128, or what the model has positions for.

    Raises:
        CompressError: a config without a padding token, a tokenizer of another model, a length
            beyond the model's positions, or labels that the head does not have.
    """
    if bool(examples.images) != (head.task == "image"):
        raise CompressError(
            f"labelled {'images' if head.task == 'image' else 'texts'}, which the model reads",
            examples.description, "Choose other examples, or name their columns (image, text)",
        )  # fmt: skip
    if head.task == "image":
        return _image_rows(examples, head, ImageProcessor.of(tokenizer), config)
    check_tokenizer(tokenizer, config)
    padding = config.get_text_config().pad_token_id
    if padding is None:  # decoders answer at the last token that is another one
        raise CompressError(
            "a pad_token_id in config.json, since examples differ in length", "none",
            "Set it to the id of the tokenizer's padding token, with which the head was trained",
        )  # fmt: skip
    if examples.by_word != (head.task == "token"):
        raise CompressError(
            "examples with a label for each word" if head.task == "token" else
            "examples with a label for each text",
            "labels of words" if examples.by_word else "labels of texts",
            "Name the columns (text, label): lists of words and of their labels for a model that "
            "labels tokens, else a text and its label",
        )  # fmt: skip
    # RoBERTa-like models have one type, which all tokens are of.
    typed = (getattr(config, "type_vocab_size", None) or 0) > 1
    if examples.by_word:
        return _word_rows(examples, head, tokenizer, config, length, padding)
    read = tokenizer(
        list(examples.texts), None if examples.pairs is None else list(examples.pairs),
        truncation=True, max_length=example_length(length, config), return_attention_mask=False,
        return_token_type_ids=typed, verbose=False,
    )  # fmt: skip
    sequences = {"input_ids": read["input_ids"]}
    if typed:
        sequences[_TYPES] = read[_TYPES]
    kind = torch.float32 if head.regression else torch.int64
    labels = torch.tensor(label_values(examples, head.names), dtype=kind)
    rows = Rows(sequences, labels, padding)
    check_ids(rows.ids, config)
    return rows


def _word_rows(
    examples: Examples,
    head: Head,
    tokenizer: Any,
    config: PreTrainedConfig,
    length: int | None,
    padding: int,
) -> Rows:
    """Tokens of texts that come as words. The first token of each word has the word's label, as
    BERT's authors did it (Devlin et al. 2019, section 5.3); words that are cut off have none."""
    if not getattr(tokenizer, "is_fast", False):
        raise CompressError(
            "a fast tokenizer, which tells the tokens of each word", type(tokenizer).__name__,
            "Put a tokenizer.json beside the model",
        )  # fmt: skip
    read = tokenizer(
        [list(words) for words in examples.texts], is_split_into_words=True, truncation=True,
        max_length=example_length(length, config), return_attention_mask=False, verbose=False,
    )  # fmt: skip
    values, ids, labels = iter(label_values(examples, head.names)), [], []
    for row, words in enumerate(examples.texts):
        right = [int(next(values)) for _ in words]
        told, before = [], None
        for word in read.word_ids(row):
            told.append(IGNORED if word is None or word == before else right[word])
            before = word
        ids.append(read["input_ids"][row])
        labels.append(told)
    rows = Rows({IDS: ids, LABELS: labels}, None, padding)
    check_ids(rows.ids, config)
    return rows


def _image_rows(
    examples: Examples, head: Head, processor: ImageProcessor, config: PreTrainedConfig
) -> ImageRows:
    """Pixel values of images, made when they are asked for."""
    wanted = image_shape(config)

    def pixels(indices: torch.Tensor) -> torch.Tensor:
        return torch.stack([one(number) for number in indices.tolist()])

    def one(number: int) -> torch.Tensor:
        try:
            made = processor.pixels(in_channels(picture(examples.images[number]), wanted[0]))
        except CompressError as error:
            raise error.within(f"image {number + 1} of {examples.description}") from None
        if tuple(made.shape) != wanted:
            raise CompressError(
                f"images of {wanted[1]} x {wanted[2]} pixels, as the model reads them",
                f"{made.shape[1]} x {made.shape[2]} after its image processor",
                f"Correct the sizes in {FILE}",
            )
        return made

    kind = torch.float32 if head.regression else torch.int64
    labels = torch.tensor(label_values(examples, head.names), dtype=kind)
    digest = f"{images_digest(examples.images)} {processor.digest}"
    one(0)
    return ImageRows(pixels, labels, len(examples), image_tokens(config), digest)


def example_length(length: int | None, config: PreTrainedConfig) -> int:
    """Tokens of an example at most.

    Raises:
        CompressError: more than the model has positions for.
    """
    positions = positions_of(config)
    if length is None:
        return min(LENGTH, positions or LENGTH)
    if positions and length > positions:
        raise CompressError(
            f"a length of at most {positions}, the model's positions", str(length), "Lower it"
        )
    return length


def rows_digest(rows: Rows | ImageRows) -> str:
    """sha256 of all that a model is given and should answer, as hex."""
    if isinstance(rows, ImageRows):
        right = [] if rows.labels is None else rows.labels.tolist()
        return hashlib.sha256(f"{rows.digest} {right}".encode()).hexdigest()
    # Labels of words are among the sequences.
    labels = torch.empty(0) if rows.labels is None else rows.labels.double()
    parts = [rows.lengths, *rows.flat.values(), labels.view(torch.int64)]
    return token_digest(torch.cat([part.long() for part in parts]))


def head_for(spec: ExamplesSpec, examples: Examples | None) -> Head:
    """The head that answers such examples.

    Args:
        examples: None before they have been read: unless spec or task name the labels, the head
            then has two, as many as transformers gives a head by itself.
    """
    if spec.regression:
        return Head("sequence")
    if examples is None:
        return Head("sequence", spec.names or ("0", "1"))
    if examples.images:
        return Head("image", label_names(examples))
    return Head("token" if examples.by_word else "sequence", label_names(examples))


def load_rows(
    spec: ExamplesSpec | Examples,
    head: Head | None,
    tokenizer: Any,
    config: PreTrainedConfig,
    length: int | None,
    data_root: str | Path | None,
) -> tuple[Examples, Rows | ImageRows]:
    """Read labelled texts or images for a model.

    Args:
        spec: where they are, or the examples themselves.

    Raises:
        CompressError: a model without a head of labels, no tokenizer, or what
            :func:`compress.data.examples.load_examples` and :func:`labelled_rows` raise.
    """
    if head is None:
        raise CompressError(
            "a model with a head of labels (...ForSequenceClassification, "
            "...ForImageClassification) for examples",
            ", ".join(config.architectures or ()) or config.model_type,
            "Use text, or fine-tune a head first (model.train with examples)",
        )  # fmt: skip
    check_reader(tokenizer, head)
    examples = spec if isinstance(spec, Examples) else load_examples(spec, data_root)
    return examples, labelled_rows(examples, head, tokenizer, config, length)


def check_reader(reader: Any, head: Head) -> None:
    """Refuse a model's tokenizer or image processor that does not read what its head answers.

    Raises:
        CompressError: another object, or none.
    """
    images = head.task == "image"
    able = isinstance(reader, ImageProcessor) or hasattr(reader, "image_processor_type")
    if images and not (able or callable(getattr(reader, "preprocess", None))):
        raise CompressError(
            f"an image processor ({FILE} beside the weights), to read images with",
            "none" if reader is None else type(reader).__name__,
            "Put the model's own there, or give it (tokenizer=...)",
        )  # fmt: skip
    if not images and not callable(getattr(reader, "get_vocab", None)):
        raise CompressError("a tokenizer, to read examples with", type(reader).__name__)
