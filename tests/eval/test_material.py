"""What masked generators are evaluated on is read, or refused, before any work."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from compress.data.codebook import fit_codebook
from compress.data.images import ImageSpec, load_images
from compress.data.text import Text
from compress.errors import CompressError
from compress.eval import EvaluationSpec
from compress.generators import ClassCondition, MaskedGeneration
from compress.planning.evaluation_material import (
    check_objective,
    document_sequences,
    generator_material,
)

DOCUMENTS = ("the river", "a stone", "", "quiet light over water")


@pytest.fixture(scope="module")
def codebook():
    return fit_codebook(load_images(ImageSpec(limit=200)), (4, 4), 16)


@pytest.fixture
def image_config(tiny, codebook):
    description = MaskedGeneration(
        mask_id=codebook.mask, vocabulary=codebook.slots, length=codebook.tokens,
        condition=ClassCondition(offset=codebook.slots, classes=10, null=codebook.no_class),
    )  # fmt: skip
    config = tiny("bert").config
    description.store(config)
    return config


def test_images_are_held_out_and_their_class_is_given(image_config, codebook) -> None:
    spec = EvaluationSpec(images={"source": "digits", "limit": 50})
    found = generator_material(spec, image_config, codebook, None, None)
    data, real = found.sequences, found.judges.images
    assert data.tokens.shape == (50, 5) and data.free.sum(1).unique().tolist() == [4]
    assert not data.free[:, 0].any()
    assert torch.equal(data.tokens, codebook.rows(found.images))
    assert len(real.pixels) == 1438 and len(real.test_pixels) == 50
    assert found.judges.decoder.decode(data.tokens).shape == (50, 8, 8)


def test_images_need_a_codebook_and_its_size(image_config, codebook, tokenizer) -> None:
    spec = EvaluationSpec(images={"source": "digits"})
    with pytest.raises(CompressError, match="a codebook"):
        generator_material(spec, image_config, tokenizer, None, None)
    images = load_images(ImageSpec(limit=50))
    wide = SimpleNamespace(**{**vars(images), "pixels": images.pixels.repeat(1, 2, 2)})
    other = fit_codebook(wide, (4, 4), 16, classes=10)
    with pytest.raises(CompressError, match="16x16"):
        generator_material(spec, image_config, other, None, None)


def test_documents_keep_their_own_lengths(tiny, tokenizer) -> None:
    spec = EvaluationSpec(objective="masked", packing="documents", window=16)
    description = MaskedGeneration.of(tiny("bert"), tokenizer)
    text = Text(DOCUMENTS, "\n", "words")
    found = document_sequences(spec, description, tokenizer, text)
    assert found.sizes.tolist() == [9, 7, 16]  # the empty one is left out, the last one cut
    assert found.lengths.tolist() == [9, 7, 16]
    assert found.bytes_per_token == 1
    short = spec.model_copy(update={"max_tokens": 10})
    assert len(document_sequences(short, description, tokenizer, text)) == 2
    with pytest.raises(CompressError, match="documents with tokens"):
        document_sequences(spec, description, tokenizer, Text(("",), "\n", "nothing"))


def test_what_a_model_cannot_be_asked(tiny, image_config, tokenizer) -> None:
    plain, causal = tiny("bert").config, tiny("llama").config
    assert check_objective(image_config, EvaluationSpec())
    assert not check_objective(plain, EvaluationSpec())
    assert check_objective(plain, EvaluationSpec(objective="masked"), tokenizer)
    with pytest.raises(CompressError, match="mask token"):
        check_objective(plain, EvaluationSpec(objective="masked"))
    with pytest.raises(CompressError, match="evaluation.images"):
        check_objective(causal, EvaluationSpec(images={"source": "digits"}))
    assert not check_objective(plain, EvaluationSpec(packing="documents"))
    with pytest.raises(CompressError, match="evaluation.packing"):
        check_objective(causal, EvaluationSpec(packing="documents"))
    with pytest.raises(CompressError, match="is_causal"):
        check_objective(causal, EvaluationSpec(objective="masked"), tokenizer)
    causal.masked_generation = MaskedGeneration(mask_id=6).model_dump()
    with pytest.raises(CompressError, match="is_causal"):
        check_objective(causal, EvaluationSpec())
