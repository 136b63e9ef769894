"""Byte-level tokenizers trained on a recipe's own text, saved as transformers' fast tokenizers."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from compress.errors import CompressError
from compress.train.create.spec import BYTES, SPECIAL, TokenizerSpec


def make_tokenizer(
    spec: TokenizerSpec, documents: Sequence[str], length: int, *, ends: bool = False
) -> PreTrainedTokenizerFast:
    """Train a tokenizer: ids 0-255 are the bytes, then merges, then <pad>, <eos>, <mask>.

    Byte pair encoding on bytes with GPT-2's split into words (Radford et al. 2019, section 2.2); no
    merge crosses a word. No text is unknown to it.

    Args:
        documents: the training text.
        length: tokens a sequence of the model, for ``model_max_length``.
        ends: put <eos> behind each text by itself, so that two texts of a pair are told apart.

    Raises:
        CompressError: the text has too few pairs for a vocabulary of that size.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    ids = {token: i for i, token in enumerate(sorted(alphabet))}
    tokenizer = Tokenizer(models.BPE(ids, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=spec.kind == "bpe"
    )
    tokenizer.decoder = decoders.ByteLevel()
    wanted = spec.size - len(SPECIAL)
    if spec.kind == "bpe":
        trainer = trainers.BpeTrainer(
            vocab_size=wanted, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(documents, trainer)
    if tokenizer.get_vocab_size() != wanted:
        reached = tokenizer.get_vocab_size() + len(SPECIAL)
        raise CompressError(
            f"a text with enough pairs of tokens for a vocabulary of {spec.size}",
            f"one that gives {reached} ({BYTES} bytes included)",
            "Lower tokenizer.size, or choose a longer text",
        )
    tokenizer.add_special_tokens(list(SPECIAL))  # in this order; transformers has another
    pad, end, mask = SPECIAL
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {end}", pair=f"$A {end} $B:1 {end}:1",
            special_tokens=[(end, tokenizer.token_to_id(end))],
        )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, eos_token=end, bos_token=end, mask_token=mask,
        model_max_length=length, clean_up_tokenization_spaces=False,
    )  # fmt: skip
