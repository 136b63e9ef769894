"""The evaluation text as a model reads it: windows of a stream, or documents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress.data.framing import Frame, frame_for, is_masked_lm, with_note
from compress.data.given import GivenText
from compress.data.text import Text, TextSpec, load_text
from compress.data.tokens import (
    check_ids,
    check_tokenizer,
    document_tokens,
    token_digest,
    token_stream,
)
from compress.errors import CompressError
from compress.eval import EvaluationSpec
from compress.eval.parts import masked_window
from compress.models.special_tokens import added_tokens


@dataclass(frozen=True)
class TextMaterial:
    """An evaluation text and its tokens.

    Attributes:
        text: None where somebody gave token ids.
        tokens: int64 [n], the stream that windows are cut from, without special tokens.
        documents: int64 [n] each, where these are scored instead of windows.
        bytes: of the tokens, UTF-8; None where there is no tokenizer to tell.
        frame: the special tokens around each window or document.
        pinned: what a run's results depend on, for its lock.
    """

    text: Text | None
    tokens: torch.Tensor
    documents: list[torch.Tensor] | None
    bytes: int | None
    frame: Frame
    pinned: str

    def entry(self, name: str) -> Any:
        """What a report says of it."""
        from compress.eval.report import DataEntry

        return DataEntry(
            role="evaluation",
            name=name,
            sha256=token_digest(self.tokens),
            bytes=self.text.bytes if self.text else self.bytes,
            tokens=len(self.tokens),
            detail=with_note(self.text.description if self.text else name, self.frame),
        )


def text_material(
    source: TextSpec | GivenText,
    spec: EvaluationSpec,
    config: Any,
    tokenizer: Any,
    data_root: str | Path | None,
    *,
    generates: bool = False,
) -> TextMaterial:
    """Read the evaluation text and make tokens of it.

    Args:
        source: where the text is, or the text itself.
        tokenizer: may be None where token ids are given.
        generates: the model is evaluated as a masked generator.

    Raises:
        CompressError: what :func:`compress.data.text.load_text` raises, a tokenizer of another
            model, no documents with tokens, or token ids of special tokens alone.
    """
    if tokenizer is not None:
        check_tokenizer(tokenizer, config)
    rows = _bare(source.rows, tokenizer) if isinstance(source, GivenText) else ()
    text = None if rows else _text(source, data_root, tokenizer)
    kind = "generator" if generates else "masked" if is_masked_lm(config) else "causal"
    packed = spec.packing == "documents"
    frame = Frame()
    if tokenizer is not None:
        frame = frame_for(
            config, tokenizer, special_tokens=spec.special_tokens, documents=packed, kind=kind
        )
    documents = None
    if packed:
        window = masked_window(config, spec)
        cut = [row[:window] for row in rows] or document_tokens(text, tokenizer, window)
        documents = _head(cut, spec)
        tokens = torch.cat(documents)
    elif rows:
        tokens = torch.cat(rows)[: spec.max_tokens]
    else:
        tokens = token_stream(text, tokenizer, spec.max_tokens)
    check_ids(tokens, config)
    told = [token_digest(tokens)]
    if documents is not None:
        told.append(token_digest(torch.tensor([len(d) for d in documents])))
    if kind == "causal":
        told += map(str, frame.prefix)
    # One digest alone is what older runs have pinned, and for them nothing has changed.
    pinned = told[0] if len(told) == 1 else hashlib.sha256(" ".join(told).encode()).hexdigest()
    # Special tokens and byte fallbacks make decoding the honest way to count the bytes.
    size = None if tokenizer is None else len(tokenizer.decode(tokens.tolist()).encode())
    return TextMaterial(text, tokens, documents, size, frame, pinned)


def _bare(rows: tuple[torch.Tensor, ...], tokenizer: Any) -> tuple[torch.Tensor, ...]:
    """Token ids without what the tokenizer puts around a text by itself: they get it again, and
    once for each window or document. Rows without both ends of it are left as they are.

    Raises:
        CompressError: nothing else is in them.
    """
    if tokenizer is None or not rows:
        return rows
    prefix, suffix = map(list, added_tokens(tokenizer))
    if not prefix and not suffix:
        return rows
    bare = []
    for row in rows:
        ids, end = row.tolist(), len(row) - len(suffix)
        framed = end >= len(prefix) and ids[: len(prefix)] == prefix and ids[end:] == suffix
        bare.append(row[len(prefix) : end] if framed else row)
    kept = tuple(row for row in bare if len(row))
    if not kept:
        raise CompressError(
            "token ids of a text", "nothing but the tokens that the tokenizer puts around one",
            where="text",
        )  # fmt: skip
    return kept


def _text(source: TextSpec | GivenText, data_root: str | Path | None, tokenizer: Any) -> Text:
    if isinstance(source, GivenText):
        return source.text(tokenizer)
    return load_text(source, data_root, tokenizer=tokenizer)


def _head(documents: Iterable[torch.Tensor], spec: EvaluationSpec) -> list[torch.Tensor]:
    """Documents until ``max_tokens`` are used."""
    kept, used = [], 0
    for ids in documents:
        if spec.max_tokens is not None and used >= spec.max_tokens:
            break
        kept.append(ids)
        used += len(ids)
    if not kept:
        raise CompressError("documents with tokens", "none", "Choose another text")
    return kept
