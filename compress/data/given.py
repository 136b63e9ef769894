"""Evaluation texts and labelled examples as Python users have them: no file, no hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress.data.chat import render_chats
from compress.data.examples import Examples, examples_of
from compress.data.examples_spec import ExamplesSpec
from compress.data.pictures import undecoded
from compress.data.readers import CHAT, TEXT, Chat, is_chat
from compress.data.storage import classes_of
from compress.data.text import Text
from compress.errors import CompressError
from compress.models.inputs import IDS, MASK

TEXTS = (
    "texts (a string, a list of strings or conversations, a datasets.Dataset with a column text or "
    "messages) or token ids (a tensor, an array, what a tokenizer returns, batches of a DataLoader)"
)


@dataclass(frozen=True)
class GivenText:
    """A text that somebody has in memory: documents, or token ids where it was tokenised already.

    Attributes:
        documents: strings and conversations; empty where there are ids.
        rows: token ids, int64 [n] each, without padding; empty where there are documents.
    """

    documents: tuple[str | Chat, ...] = ()
    rows: tuple[torch.Tensor, ...] = ()

    @property
    def source(self) -> str:
        """What a report calls it."""
        count = len(self.documents or self.rows)
        what = "text" if self.documents else "sequence of token ids"
        return f"{count:,} {what}{'s' if count != 1 else ''} in memory"

    def text(self, tokenizer: Any) -> Text:
        """The documents as a text; the tokenizer's chat template makes texts of conversations."""
        documents, about = render_chats(self.documents, self.source, tokenizer)
        return Text(tuple(documents), "\n\n", about)


def given_text(given: Any) -> GivenText:
    """Read an evaluation text.

    Raises:
        CompressError: none of these forms, the name of a file, or nothing.
    """
    if isinstance(given, str):
        _refuse_file(given)
        given = [given]
    if isinstance(given, (torch.Tensor, np.ndarray, Mapping)):
        given = [given]
    if isinstance(given, (bytes, Path)) or not isinstance(given, Iterable):
        raise CompressError(TEXTS, type(given).__name__, where="text")
    documents: list[str | Chat] = []
    rows: list[torch.Tensor] = []
    for item in given:
        for value in _values(item):
            if isinstance(value, torch.Tensor):
                rows.append(value)
            elif not isinstance(value, str) or value.strip():
                documents.append(value)
    if bool(documents) == bool(rows):
        both = f"{len(documents)} texts and {len(rows)} rows of ids"
        raise CompressError(TEXTS, both if documents else "nothing in them", where="text")
    return GivenText(tuple(documents), tuple(rows))


def given_examples(given: Any) -> Examples:
    """Read labelled examples: a list of objects, or a ``datasets.Dataset``, with the columns text
    (and text_pair), those of GLUE, or image, and label. Where the data set names its labels
    (``ClassLabel``), they are known by name.

    Raises:
        CompressError: other rows, columns that are missing, or none at all.
    """
    if isinstance(given, (str, bytes, Mapping, torch.Tensor)) or not isinstance(given, Iterable):
        raise CompressError(
            "examples: a list of objects with text and label, or a datasets.Dataset",
            type(given).__name__, where="examples",
        )  # fmt: skip
    rows = []
    for number, row in enumerate(undecoded(given), 1):
        if not isinstance(row, Mapping):
            raise CompressError(
                "examples with the columns text and label", f"{row!r:.60} as number {number}",
                where="examples",
            )  # fmt: skip
        rows.append(dict(row))
    return examples_of(rows, ExamplesSpec(source="memory"), "a list in memory", classes_of(given))


def _values(item: Any) -> Iterator[str | Chat | torch.Tensor]:
    """The texts or rows of ids of one item: a sample, or a batch of them."""
    if isinstance(item, str) or is_chat(item):
        yield item
    elif isinstance(item, Mapping):
        if IDS in item:
            yield from _rows(item[IDS], item.get(MASK))
            return
        value = item.get(TEXT, item.get(CHAT))
        if value is None:
            told = ", ".join(map(str, item)) or "nothing"
            raise CompressError(f"columns {TEXT}, {CHAT} or {IDS}", told, where="text")
        yield from [value] if isinstance(value, str) or is_chat(value) else value
    elif isinstance(item, (list, tuple)) and item and isinstance(item[0], (str, torch.Tensor)):
        for value in item:  # a batch of texts, or what a DataLoader over a TensorDataset yields
            yield from _values(value)
    else:
        yield from _rows(item, None)


def _rows(ids: Any, mask: Any) -> Iterator[torch.Tensor]:
    """Rows of ids without what a mask calls padding."""
    ragged = isinstance(ids, (list, tuple)) and bool(ids) and isinstance(ids[0], (list, tuple))
    if ragged:
        masks = mask if mask is not None else [None] * len(ids)
        for row, seen in zip(ids, masks, strict=True):
            yield from _rows(row, seen)
        return
    try:
        values = ids if isinstance(ids, torch.Tensor) else torch.as_tensor(np.asarray(ids))
    except (TypeError, ValueError) as error:
        raise CompressError(TEXTS, f"{type(ids).__name__} ({error})", where="text") from None
    if values.dim() not in (1, 2) or values.is_floating_point() or values.dtype == torch.bool:
        shape = f"{str(values.dtype).removeprefix('torch.')} {list(values.shape)}"
        raise CompressError("token ids [tokens] or [rows, tokens]", shape, where="text")
    values = values.detach().to("cpu", torch.int64).reshape(-1, values.shape[-1])
    seen = torch.ones_like(values) if mask is None else torch.as_tensor(mask).reshape(values.shape)
    for row, kept in zip(values, seen.bool().cpu(), strict=True):
        if bool(kept.any()):
            yield row[kept]


def _refuse_file(text: str) -> None:
    """Its name is no text to evaluate on."""
    try:
        names_one = len(text) < 1000 and Path(text).is_file()
    except (OSError, ValueError):  # with characters that no name can have
        return
    if names_one:
        raise CompressError(
            "an evaluation text", f"the name of a file, {text!r}",
            'Give {"source": NAME}, or what is in it',
        )  # fmt: skip
