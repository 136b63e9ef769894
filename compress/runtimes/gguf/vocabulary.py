"""A Hugging Face tokenizer as GGUF metadata: tokens, merges or scores, special tokens, template.

llama.cpp splits text into words by one of its own patterns, which the file names; only tokenizers
whose splitting is one of those can be written. Two kinds: byte-level BPE ("gpt2") and BPE over
characters with bytes to fall back on, as SentencePiece makes it ("llama").
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.models.loading import load_tokenizer

_GPT2 = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
_CASELESS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
_TAIL = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
# What a tokenizer.json splits by, digit by digit or not -> llama.cpp's name (llama-vocab.cpp).
_SPLITS = {
    (_GPT2, False): "gpt-2",
    (_GPT2, True): "smollm",
    (f"{_CASELESS}\\p{{N}}{{1,3}}{_TAIL}", False): "llama-bpe",
    (f"{_CASELESS}\\p{{N}}{_TAIL}", False): "qwen2",
}


def check_vocabulary(folder: Path) -> None:
    """Refuse a tokenizer that cannot be written, before anything is.

    Raises:
        CompressError: no tokenizer.json, one that does not load, or of a kind llama.cpp lacks.
    """
    _split_of(_read(folder))
    _, reason = load_tokenizer(folder)
    if reason:
        raise CompressError("a tokenizer that loads", reason, _WITHOUT)


_WITHOUT = "Export without one: --no-tokenizer"


def add_vocabulary(writer: Any, folder: Path, size: int) -> None:
    """Put the tokenizer of a folder into a ``gguf.GGUFWriter``.

    Args:
        size: rows of the embedding; numbers without a token get an unused one.

    Raises:
        CompressError: see :func:`check_vocabulary`.
    """
    import gguf

    data = _read(folder)
    split = _split_of(data)
    tokenizer, _ = load_tokenizer(folder)
    assert tokenizer is not None, "checked"
    tokens, kinds = _tokens(data, size)
    writer.add_tokenizer_model("llama" if split is None else "gpt2")
    writer.add_tokenizer_pre(split or "default")
    writer.add_token_list(tokens)
    if split is None:
        writer.add_token_scores(_scores(data, tokens))
        writer.add_add_space_prefix(_prefixes_space(data))
    writer.add_token_types(kinds)
    special = gguf.SpecialVocab(folder, load_merges=split is not None, n_vocab=size)
    ids = tokenizer("a").input_ids
    special.add_special_token["bos"] = bool(ids) and ids[0] == tokenizer.bos_token_id
    special.add_special_token["eos"] = bool(ids) and ids[-1] == tokenizer.eos_token_id
    special.special_token_ids = {
        kind: token
        for kind in ("bos", "eos", "unk", "sep", "pad", "mask")
        if (token := getattr(tokenizer, f"{kind}_token_id", None)) is not None and token < size
    }
    special.chat_template = tokenizer.chat_template
    special.add_to_gguf(writer, quiet=True)


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CompressError(
            "tokenizer.json, from which GGUF's is made", f"none in {folder}", _WITHOUT
        )
    return json.loads(path.read_text(encoding="utf-8"))


def _split_of(data: dict[str, Any]) -> str | None:
    """llama.cpp's name of what a tokenizer splits by; None for BPE as SentencePiece has it.

    Raises:
        CompressError: it has no name for it.
    """
    kind = data["model"].get("type")
    steps = _flat(data.get("pre_tokenizer"), "pretokenizers")
    if kind == "BPE" and data["model"].get("merges"):
        if data["model"].get("byte_fallback") and not any(s["type"] == "ByteLevel" for s in steps):
            return None
        digits = any(s["type"] == "Digits" and s.get("individual_digits") for s in steps)
        patterns = [
            s["pattern"].get("Regex", "") if s["type"] == "Split" else _GPT2
            for s in steps
            if s["type"] == "Split" or (s["type"] == "ByteLevel" and s.get("use_regex", True))
        ]
        prefixed = any(s.get("add_prefix_space") for s in steps)
        if len(patterns) == 1 and not prefixed and (patterns[0], digits) in _SPLITS:
            return _SPLITS[patterns[0], digits]
    raise CompressError(
        "a tokenizer whose splitting llama.cpp has (byte-level BPE of GPT-2, SmolLM, Llama 3 or "
        "Qwen 2, or SentencePiece's BPE)",
        f"{kind} behind {[s['type'] for s in steps] or 'no pre-tokenizer'}", _WITHOUT,
    )  # fmt: skip


def _flat(step: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return step[inner] if step["type"] == "Sequence" else [step]


def _tokens(data: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Tokens by number and their kinds (``gguf.TokenType``)."""
    from gguf import TokenType

    tokens = [f"[PAD{i}]" for i in range(size)]
    kinds = [int(TokenType.UNUSED)] * size
    fallback = data["model"].get("byte_fallback")
    for token, number in data["model"]["vocab"].items():
        if number < size:
            tokens[number] = token
            is_byte = fallback and len(token) == 6 and token.startswith("<0x")
            kinds[number] = int(TokenType.BYTE if is_byte else TokenType.NORMAL)
    for added in data.get("added_tokens", []):
        if (number := added["id"]) < size:
            tokens[number] = added["content"]
            kinds[number] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
            if added["content"] == data["model"].get("unk_token"):
                kinds[number] = int(TokenType.UNKNOWN)
    return tokens, kinds


def _scores(data: dict[str, Any], tokens: list[str]) -> list[float]:
    """What llama.cpp merges by, highest first: the place of a token's merge, as SentencePiece's
    own scores are; tokens that no merge makes come last."""
    places: dict[str, int] = {}
    for place, merge in enumerate(data["model"]["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        places.setdefault(left + right, place)
    return [-float(places.get(token, len(places))) for token in tokens]


def _prefixes_space(data: dict[str, Any]) -> bool:
    """Whether a text gets a space in front."""
    steps = _flat(data.get("normalizer"), "normalizers") + _flat(
        data.get("pre_tokenizer"), "pretokenizers"
    )
    return any(
        s["type"] == "Prepend"
        or (s["type"] == "Metaspace" and s.get("prepend_scheme", "always") != "never")
        for s in steps
    )
