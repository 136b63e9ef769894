"""Labelled texts that a tiny model learns in seconds, and tiny models with heads of labels."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

from compress.conformance.models import SPECIAL, TINY, make_tokenizer

_GOOD, _BAD = ("good", "fine", "warm", "kind"), ("bad", "cold", "dull", "mean")
_FILL = ("the", "a", "of", "river", "stone", "was", "very")


def review(generator: random.Random) -> dict[str, str]:
    """A few words, one of which decides the label; the second text repeats it in half of them."""
    mood = generator.choice(("bad", "good"))
    words = generator.choices(_FILL, k=generator.randint(2, 6))
    words.insert(0, generator.choice(_GOOD if mood == "good" else _BAD))
    return {"review": " ".join(words), "reply": generator.choice(_FILL), "mood": mood}


@pytest.fixture(scope="session")
def reviews(tmp_path_factory) -> Callable[..., Path]:
    """``reviews(count, seed)``: a .jsonl file with columns review, reply and mood."""

    def make(count: int, seed: int = 0) -> Path:
        generator = random.Random(seed)
        path = tmp_path_factory.mktemp("reviews") / f"reviews-{seed}.jsonl"
        rows = [json.dumps(review(generator)) for _ in range(count)]
        path.write_text("\n".join(rows) + "\n")
        return path

    return make


@pytest.fixture(scope="session")
def columns() -> dict[str, str]:
    """Where the examples of ``reviews`` are."""
    return {"text": "review", "label": "mood"}


@pytest.fixture(scope="session")
def classifier() -> Callable[..., PreTrainedModel]:
    """``classifier(**config fields)``: a tiny BERT with a head, the same one every time."""

    def make(seed: int = 0, **fields: Any) -> PreTrainedModel:
        torch.manual_seed(seed)
        named = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
        config = BertConfig(**{**TINY["bert"][1], **named, **fields})
        model = BertForSequenceClassification(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.config.architectures = ["BertForSequenceClassification"]
        return model

    return make


@pytest.fixture(scope="session")
def pairing() -> Any:
    """A tokenizer that puts [CLS] and [SEP] around a text, and the second of a pair apart."""
    from tokenizers import processors

    made = make_tokenizer()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, SPECIAL.index(token)) for token in ("[CLS]", "[SEP]")],
    )  # fmt: skip
    return made
