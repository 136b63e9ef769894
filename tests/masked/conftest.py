"""Tiny masked generators: one of images with classes, one of text, and a way to watch them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from compress.generators import ClassCondition, Denoiser, MaskedGeneration

CODES, CLASSES, TOKENS = 16, 10, 16
NULL, MASK = CODES + CLASSES, CODES + CLASSES + 1


class Watched(Denoiser):
    """Keeps the ids of every evaluation."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.seen: list[torch.Tensor] = []

    def logits(self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None):
        self.seen.append(ids.clone())
        return super().logits(ids, attention_mask)


@pytest.fixture(scope="session")
def described() -> MaskedGeneration:
    return MaskedGeneration(
        mask_id=MASK,
        vocabulary=CODES,
        condition=ClassCondition(offset=CODES, classes=CLASSES, null=NULL),
        length=TOKENS,
        grid=(4, 4),
        weighting="maskgit",
    )


@pytest.fixture
def images(tiny, described) -> Callable[..., Watched]:
    """``images(**fields)``: a class-conditional generator with a changed description."""

    def make(**fields: Any) -> Watched:
        model = tiny("bert", vocab_size=MASK + 1, pad_token_id=None)
        spec = MaskedGeneration(**{**described.model_dump(), **fields})
        spec.store(model.config)
        return Watched(model)

    return make


@pytest.fixture
def text(tiny, tokenizer) -> Callable[..., Watched]:
    """``text(family)``: a generator of text derived from a tokenizer."""

    def make(family: str = "bert", **fields: Any) -> Watched:
        model = tiny(family, **fields)
        return Watched(model, MaskedGeneration.of(model, tokenizer))

    return make
