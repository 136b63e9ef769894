"""A tokenizer from a word list and a pattern, for models that shipped their splitting as code."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerFast

# Reaction SMILES as the molecular transformers read them (Schwaller et al. 2019,
# https://doi.org/10.1021/acscentsci.9b00576): bracket atoms, ring closures of two or three digits,
# two-letter halogens, single atoms, then bonds, branches and reaction arrows.
SMILES = r"\[[^\]]+\]|%\([0-9]{3}\)|%[0-9]{2}|Br|Cl|[BCNOSPFIbcnosp]|>>|[>|().=#+\-\\/:~@?*$0-9]"


def word_tokenizer(vocabulary: Path, pattern: str, max_length: int) -> PreTrainedTokenizerFast:
    """Build a tokenizer that cuts text into the matches of ``pattern`` and looks each up.

    Text between the matches is dropped, as a ``re.findall`` would. Sequences are wrapped in
    ``[CLS]`` and ``[SEP]``, as BERT reads them.

    Args:
        vocabulary: a file with one token per line; the line number is the id. It must hold [UNK],
            [CLS], [SEP], [PAD] and [MASK].
        pattern: a regular expression.
        max_length: the model's longest input, in tokens.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    words = vocabulary.read_text(encoding="utf-8").splitlines()
    ids = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, ids[token]) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        pad_token="[PAD]", mask_token="[MASK]", model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
