"""The evaluation text as a model reads it: windows of a stream, or documents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress.data.framing import Frame, frame_for, is_masked_lm, with_note
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


@dataclass(frozen=True)
class TextMaterial:
    """An evaluation text and its tokens.

    Attributes:
        tokens: int64 [n], the stream that windows are cut from, without special tokens.
        documents: int64 [n] each, where these are scored instead of windows.
        bytes: of the tokens, UTF-8.
        frame: the special tokens around each window or document.
        pinned: what a run's results depend on, for its lock.
    """

    text: Text
    tokens: torch.Tensor
    documents: list[torch.Tensor] | None
    bytes: int
    frame: Frame
    pinned: str

    def entry(self, name: str) -> Any:
        """What a report says of it."""
        from compress.eval.report import DataEntry

        return DataEntry(
            role="evaluation",
            name=name,
            sha256=token_digest(self.tokens),
            bytes=self.text.bytes,
            tokens=len(self.tokens),
            detail=with_note(self.text.description, self.frame),
        )


def text_material(
    text_spec: TextSpec,
    spec: EvaluationSpec,
    config: Any,
    tokenizer: Any,
    data_root: str | Path | None,
    *,
    generates: bool = False,
) -> TextMaterial:
    """Read the evaluation text and make tokens of it.

    Args:
        generates: the model is evaluated as a masked generator.

    Raises:
        CompressError: what :func:`compress.data.text.load_text` raises, a tokenizer of another
            model, or no documents with tokens.
    """
    check_tokenizer(tokenizer, config)
    text = load_text(text_spec, data_root, tokenizer=tokenizer)
    kind = "generator" if generates else "masked" if is_masked_lm(config) else "causal"
    packed = spec.packing == "documents"
    frame = frame_for(
        config, tokenizer, special_tokens=spec.special_tokens, documents=packed, kind=kind
    )
    documents = None
    if packed:
        documents = _head(document_tokens(text, tokenizer, masked_window(config, spec)), spec)
        tokens = torch.cat(documents)
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
    size = len(tokenizer.decode(tokens.tolist()).encode())
    return TextMaterial(text, tokens, documents, size, frame, pinned)


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
