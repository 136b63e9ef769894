"""Descriptions: stored with the checkpoint, derived from a tokenizer, compared with the model."""

from __future__ import annotations

import pytest
import torch
import transformers

from compress.errors import CompressError
from compress.generators import ClassCondition, MaskedGeneration


def test_checkpoints_carry_it(images, tmp_path):
    denoiser = images(shift=True, schedule="pow:2")
    denoiser.model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert MaskedGeneration.of(loaded) == denoiser.spec == MaskedGeneration.of(loaded.config)


def test_derived_from_a_tokenizer(tiny, tokenizer):
    spec = MaskedGeneration.of(tiny("bert"), tokenizer)
    assert spec.mask_id == tokenizer.mask_token_id and spec.vocabulary == len(tokenizer)
    assert set(spec.forbidden) == set(tokenizer.all_special_ids) - {spec.mask_id}
    legal = spec.legal(264)
    assert not legal[tokenizer.all_special_ids].any() and not legal[len(tokenizer) :].any()
    assert legal.sum() == 256
    assert spec.prefix == spec.suffix == ()


def test_tokens_around_a_text_are_found(tiny, tokenizer, tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer.save_pretrained(tmp_path)
    framed = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    framed.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 4), ("[SEP]", 5)]
    )
    spec = MaskedGeneration.of(tiny("bert"), framed)
    assert spec.prefix == (4,) and spec.suffix == (5,)


def test_class_tokens(described):
    assert described.class_id(3) == 19 and described.class_id(None) == 26
    ids = torch.tensor([[19, 0, 15, 26, 27]])
    assert described.fixed(ids).tolist() == [[True, False, False, True, True]]


CLASS = {"offset": 16, "classes": 10, "null": 26}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"mask_id": 28}, r"mask id inside the model's vocabulary \(0 to 27\), got 28"),
        ({"forbidden": (99,)}, "forbidden ids inside"),
        ({"vocabulary": 30}, "the last id that may be produced inside"),
        ({"condition": {**CLASS, "classes": 20}}, "the last class inside"),
        ({"condition": {**CLASS, "offset": 12}}, "of which 12 may be produced"),
        ({"vocabulary": None}, "of which 16 may be produced"),
        ({"condition": {**CLASS, "null": 20}}, "different ids for classes"),
        ({"mask_id": 20}, "different ids for classes"),
        ({"grid": (4, 5)}, "a grid of 16 tokens"),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(tiny, described, fields, message):
    model = tiny("bert", vocab_size=28, pad_token_id=None)
    model.config.masked_generation = {**described.model_dump(mode="json"), **fields}
    with pytest.raises(CompressError, match=message):
        MaskedGeneration.of(model)


@pytest.mark.parametrize(
    "stored, place",
    [
        ({"mask": 3}, "masked_generation.mask_id"),
        ({"mask_id": 3, "weighting": "none"}, "masked_generation.weighting"),
        ({"mask_id": 3, "schedule": "cosin"}, "masked_generation.schedule"),
        ("yes", "masked_generation"),
    ],
)
def test_malformed_descriptions_are_refused(tiny, stored, place):
    model = tiny("bert")
    model.config.masked_generation = stored
    with pytest.raises(CompressError, match=place):
        MaskedGeneration.of(model)


def test_models_without_a_mask_token_are_refused(tiny, tokenizer, tmp_path):
    with pytest.raises(CompressError, match="expected a mask token"):
        MaskedGeneration.of(tiny("bert"))
    tokenizer.save_pretrained(tmp_path)
    bare = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    bare.mask_token = None
    with pytest.raises(CompressError, match="a tokenizer without one"):
        MaskedGeneration.of(tiny("bert"), bare)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_causal_models_need_the_flag(tiny, tokenizer, family):
    with pytest.raises(CompressError, match="is_causal: false"):
        MaskedGeneration.of(tiny(family), tokenizer)
    with pytest.raises(CompressError, match="is_causal: false"):
        MaskedGeneration.of(tiny(family).config, tokenizer)
    model = tiny(family, is_causal=False)
    assert MaskedGeneration.of(model, tokenizer).mask_id == tokenizer.mask_token_id


def test_masked_models_turned_decoders_are_refused(tiny, tokenizer):
    with pytest.raises(CompressError, match="is_decoder=True"):
        MaskedGeneration.of(tiny("bert", is_decoder=True), tokenizer)


def test_token_dropout_of_esm_is_refused():
    fields = {"vocab_size": 33, "hidden_size": 16, "intermediate_size": 16,
              "num_hidden_layers": 1, "num_attention_heads": 2, "mask_token_id": 32,
              "pad_token_id": 1}  # fmt: skip
    for dropout in (True, False):
        config = transformers.EsmConfig(**fields, token_dropout=dropout)
        model = transformers.EsmForMaskedLM(config)
        config.masked_generation = {"mask_id": 32}
        if dropout:
            with pytest.raises(CompressError, match="token_dropout: false"):
                MaskedGeneration.of(model)
        else:
            assert MaskedGeneration.of(model).mask_id == 32


def test_a_class_that_does_not_exist(described):
    with pytest.raises(CompressError, match="a class from 0 to 9, got 10"):
        described.class_id(10)
    without = described.model_copy(
        update={"condition": ClassCondition(offset=16, classes=10, null=None)}
    )
    with pytest.raises(CompressError, match="trained without 'no class'"):
        without.class_id(None)
