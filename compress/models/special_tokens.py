"""The tokens that a tokenizer adds to a text by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that a tokenizer puts in front of a text and behind it by itself.

    Found by encoding with and without special tokens, since a post-processor, an option
    (``add_bos_token``) or a class's own code may put them there.
    """
    for probe in ("a", "A", "1", "The 1st.", "C"):  # vocabularies of molecules lack some of them
        inner = list(tokenizer(probe, add_special_tokens=False)["input_ids"])
        outer = list(tokenizer(probe)["input_ids"])
        for start in range(len(outer) - len(inner) + 1 if inner else 0):
            if outer[start : start + len(inner)] == inner:
                return tuple(outer[:start]), tuple(outer[start + len(inner) :])
    return (), ()
