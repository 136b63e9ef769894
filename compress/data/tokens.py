"""From text to token windows: one stream, cut into windows of equal length."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch

from compress.data.text import Text
from compress.errors import CompressError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

Selection = Literal["head", "random"]

# A token's end can depend on the characters behind it, but not on those a page away: this many
# characters behind the last token that is used make a prefix's tokens equal to the whole's.
_MARGIN = 4096
_DOCUMENTS_AT_ONCE = 256


def token_stream(
    text: Text | str, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None
) -> torch.Tensor:
    """Tokenise a text as one stream, without special tokens.

    With ``max_tokens`` only as much text is tokenised as that takes; the tokens are those of the
    whole text, cut.

    Args:
        text: the text.
        tokenizer: any tokenizer of transformers.
        max_tokens: stop after so many tokens.

    Returns:
        int64 [n].

    Raises:
        CompressError: the text, or what the tokenizer makes of it, is empty.
    """
    whole = text.text if isinstance(text, Text) else text
    if not whole.strip():
        raise CompressError("a text to tokenise", "an empty one", "Choose another source or part")
    if max_tokens is None:
        ids = _encode(whole, tokenizer)
    else:
        ids = _encode_prefix(whole, tokenizer, max_tokens)
    if not ids:
        raise CompressError(
            "tokens from the text", "none", "The tokenizer does not know this kind of text"
        )
    return torch.tensor(ids, dtype=torch.int64)


def _encode_prefix(text: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[int]:
    length = 8 * max_tokens + _MARGIN  # characters; a token of prose has about four
    while length < len(text):
        ids = _encode(text[:length], tokenizer)
        # What the last _MARGIN characters became is not sure; only the tokens before it count.
        if len(ids) - len(_encode(text[length - _MARGIN : length], tokenizer)) >= max_tokens:
            return ids[:max_tokens]
        length *= 2
    return _encode(text, tokenizer)[:max_tokens]


def _encode(text: str | list[str], tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    # verbose=False: a stream is longer than the model's context on purpose.
    return tokenizer(
        text, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False,
        truncation=False, verbose=False,
    )["input_ids"]  # fmt: skip


def document_tokens(
    text: Text, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> Iterator[torch.Tensor]:
    """Tokens of each document, without special tokens: int64 [n], n at most ``max_length``.

    Documents without any are left out.
    """
    for start in range(0, len(text.documents), _DOCUMENTS_AT_ONCE):
        part = list(text.documents[start : start + _DOCUMENTS_AT_ONCE])
        for ids in _encode(part, tokenizer):
            if ids:
                yield torch.tensor(ids[:max_length], dtype=torch.int64)


def token_windows(
    stream: torch.Tensor,
    *,
    samples: int,
    length: int,
    offset: int = 0,
    selection: Selection = "head",
    seed: int = 0,
) -> torch.Tensor:
    """Cut ``samples`` windows of ``length`` tokens out of a stream; no two share a token.

    Args:
        stream: int64 [n].
        samples: number of windows.
        length: tokens in each.
        offset: tokens to skip first.
        selection: "head" takes the first windows; "random" draws from all the windows that the
            stream is cut into, without replacement, and keeps the order drawn.
        seed: for "random".

    Returns:
        int64 [samples, length], memory of its own.

    Raises:
        CompressError: the stream is too short; the numbers and what to lower are given.
    """
    if samples < 1 or length < 1 or offset < 0:
        raise CompressError(
            "samples and length of at least 1 and no negative offset",
            f"samples {samples}, length {length}, offset {offset}",
        )
    available = max(0, len(stream) - offset) // length
    if available < samples:
        raise CompressError(
            f"at least {samples} x {length} = {samples * length} tokens"
            + (f" after the first {offset}" if offset else ""),
            f"a text of {len(stream)} tokens, enough for {available} such windows",
            "Lower samples or length, or choose a longer text",
        )
    windows = stream[offset : offset + available * length].view(available, length)
    if selection == "head":
        return windows[:samples].clone()
    if selection != "random":
        raise CompressError("selection 'head' or 'random'", repr(selection))
    generator = torch.Generator().manual_seed(seed)
    return windows[torch.randperm(available, generator=generator)[:samples]]


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Refuse a tokenizer with ids that the model has no embedding for.

    Raises:
        CompressError: the largest id is not below the model's vocab_size.
    """
    size = getattr(config.get_text_config(), "vocab_size", None)
    vocabulary = tokenizer.get_vocab()
    if size is None or not vocabulary:
        return
    token, largest = max(vocabulary.items(), key=lambda item: item[1])
    if largest >= size:
        raise CompressError(
            f"a tokenizer with ids below the model's vocabulary of {size}",
            f"id {largest} ({token!r})",
            "Use the tokenizer that was saved with this model",
        )


def check_ids(ids: torch.Tensor, config: PreTrainedConfig) -> None:
    """Refuse token ids [...] outside the model's vocabulary (an index error deep in the model)."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    if size is None or not ids.numel():
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= size:
        raise CompressError(
            f"token ids from 0 to {size - 1}", f"ids from {low} to {high}",
            "Use the tokenizer that was saved with this model",
        )  # fmt: skip


def token_digest(ids: torch.Tensor) -> str:
    """sha256, as hex, of shape and values: the same on every machine, for every integer dtype."""
    shape = "x".join(map(str, ids.shape))
    values = ids.detach().to("cpu", torch.int64).contiguous().numpy().astype("<i8")
    return hashlib.sha256(f"{shape}:".encode() + values.tobytes()).hexdigest()
