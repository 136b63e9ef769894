"""Evaluation texts in memory, as text or as token ids: the same tokens either way."""

from __future__ import annotations

import pytest
import torch
from tokenizers import processors

from compress.conformance.models import SPECIAL, make_tokenizer
from compress.data.given import given_text
from compress.errors import CompressError
from compress.eval import EvaluationSpec
from compress.planning.evaluation_text import text_material

TEXTS = ["the river is slow", "a stone is not", "it was cold"]


def adding(template: str):
    """A tokenizer that puts special tokens around a text."""
    made = make_tokenizer()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template,
        special_tokens=[(token, SPECIAL.index(token)) for token in ("[CLS]", "[SEP]")],
    )
    return made


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("template", ["[CLS] $A [SEP]", "[CLS] $A", "$A [SEP]", "$A"])
@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_ids_lose_what_the_tokenizer_put_around_them(kind, template, packing, tiny):
    if kind == "llama" and packing == "documents":
        pytest.skip("documents are of masked models")
    tokenizer, config = adding(template), tiny(kind).config
    spec = EvaluationSpec(window=8, packing=packing)
    bare = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    found = [
        text_material(given_text(given), spec, config, tokenizer, None)
        for given in (
            tokenizer(TEXTS),
            tokenizer(TEXTS)["input_ids"],
            tokenizer(TEXTS, padding=True, return_tensors="pt"),
            bare,
        )
    ]
    plain = torch.tensor(sum(bare, []))
    for material in found:
        if packing == "stream":
            assert torch.equal(material.tokens, plain)
        else:
            assert [d.tolist() for d in material.documents] == [row[:8] for row in bare]
        assert material.pinned == found[-1].pinned


def test_rows_with_one_end_alone_stay_and_empty_ones_go(tiny):
    tokenizer, config = adding("[CLS] $A [SEP]"), tiny("bert").config
    start, end = (SPECIAL.index(token) for token in ("[CLS]", "[SEP]"))
    rows = [[start, 20, 21], [22, end], [start, end], [start, start, 23, end]]
    found = text_material(given_text(rows), EvaluationSpec(window=4), config, tokenizer, None)
    assert found.tokens.tolist() == [start, 20, 21, 22, end, start, 23]
    with pytest.raises(CompressError, match="nothing but the tokens"):
        text_material(given_text([[start, end]]), EvaluationSpec(), config, tokenizer, None)
    kept = text_material(given_text(rows), EvaluationSpec(window=4), config, None, None)
    assert len(kept.tokens) == 11  # no tokenizer, nothing known
