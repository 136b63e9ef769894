"""Calibration batches: what models that fill masks are calibrated on."""

from __future__ import annotations

import pytest
import torch

from compress.data.calibration import calibration_batches
from compress.data.calibration_spec import CalibrationSpec
from compress.data.codebook import fit_codebook
from compress.data.images import load_images
from compress.errors import CompressError
from compress.generators import ClassCondition, MaskedGeneration


@pytest.fixture
def spec(text):
    def make(**fields):
        return CalibrationSpec(text={"source": str(text)}, samples=32, length=24, batch=4, **fields)

    return make


@pytest.fixture
def config(tiny, tokenizer):
    """``config(family)``: of a generator of text."""

    def make(family: str = "bert"):
        model = tiny(family, **({"is_causal": False} if family == "llama" else {}))
        MaskedGeneration.of(model, tokenizer).store(model.config)
        return model.config

    return make


def hidden_shares(made) -> torch.Tensor:
    return torch.cat([(y != -100).double().mean(dim=1) for y in made.labels])


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_generators_see_all_mask_ratios(spec, config, tokenizer, family):
    made = calibration_batches(spec(), tokenizer, config(family))
    shares = hidden_shares(made).sort().values
    # One share in each of 32 strata of (0, 1], rounded up to whole tokens of 24.
    strata = torch.arange(32, dtype=torch.float64) / 32
    assert (shares > strata - 1 / 32).all() and (shares <= strata + 1 / 32 + 1 / 24 + 1e-6).all()
    for batch, labels in zip(made.batches, made.labels, strict=True):
        ids, hidden = batch["input_ids"], labels != -100
        assert ids.shape == (4, 24) and (ids[hidden] == tokenizer.mask_token_id).all()
        assert not (ids[~hidden] == tokenizer.mask_token_id).any()
    assert not torch.equal(hidden_shares(made), shares)  # strata do not come in order


def test_ratios_can_be_fixed_or_left_out(spec, config, tokenizer):
    half = calibration_batches(spec(mask_ratio=0.5), tokenizer, config())
    assert (hidden_shares(half) == 0.5).all()
    clean = calibration_batches(spec(mask_ratio=0), tokenizer, config())
    assert clean.labels is None
    restored = torch.cat([
        torch.where(y != -100, y, b["input_ids"])
        for b, y in zip(half.batches, half.labels, strict=True)
    ])  # fmt: skip
    assert torch.equal(restored, torch.cat([b["input_ids"] for b in clean.batches]))


def test_plain_masked_models_keep_fifteen_percent(spec, tiny, tokenizer):
    plain = calibration_batches(spec(), tokenizer, tiny("bert").config)
    assert (hidden_shares(plain) == 4 / 24).all()  # 3.6 of 24 tokens
    spread = calibration_batches(spec(mask_ratio="stratified"), tokenizer, tiny("bert").config)
    assert hidden_shares(spread).max() > 0.9 and hidden_shares(spread).min() < 0.1


def test_causal_models_see_no_masks(spec, tiny, tokenizer):
    made = calibration_batches(spec(mask_ratio=0.5), tokenizer, tiny("llama").config)
    assert made.labels is None


def test_the_seed_decides(spec, config, tokenizer):
    first, again, other = (
        calibration_batches(spec(), tokenizer, config(), seed=seed).digest for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize("value", [-0.1, 1.1, "spread"])
def test_ratios_that_do_not_exist(spec, value):
    with pytest.raises(ValueError, match="mask_ratio"):
        spec(mask_ratio=value)


@pytest.fixture(scope="module")
def codebook():
    return fit_codebook(load_images("digits"), (2, 2), 32)


@pytest.fixture
def picture_config(tiny, codebook):
    model = tiny("bert", vocab_size=codebook.mask + 1, pad_token_id=None)
    condition = ClassCondition(
        offset=codebook.slots, classes=codebook.classes, null=codebook.no_class
    )
    MaskedGeneration(
        mask_id=codebook.mask, vocabulary=codebook.codes, condition=condition,
        length=codebook.tokens, weighting="maskgit",
    ).store(model.config)  # fmt: skip
    return model.config


def test_images_become_rows_with_their_class(codebook, picture_config):
    images = {"source": "digits"}
    made = calibration_batches(
        CalibrationSpec(images=images, samples=20, batch=5), codebook, picture_config
    )
    ids = torch.cat([b["input_ids"] for b in made.batches])
    labels = torch.cat(made.labels)
    rows = codebook.rows(load_images("digits"))[:20]
    assert torch.equal(torch.where(labels != -100, labels, ids), rows)
    assert torch.equal(ids[:, 0], rows[:, 0]) and made.tokens == 20 * 17
    assert "digits" in made.description and made.bytes == 1438 * 64 and made.text is None
    drawn = CalibrationSpec(images=images, samples=20, selection="random", mask_ratio=0)
    some = calibration_batches(drawn, codebook, picture_config, seed=1)
    assert not torch.equal(torch.cat([b["input_ids"] for b in some.batches]), rows)


def test_data_of_the_wrong_kind_is_refused(spec, codebook, picture_config, config, tokenizer):
    images = CalibrationSpec(images={"source": "digits"}, samples=4)
    with pytest.raises(CompressError, match="calibration.text or examples for a model"):
        calibration_batches(images, tokenizer, config())
    with pytest.raises(CompressError, match="calibration.images for a model whose tokens"):
        calibration_batches(spec(), codebook, picture_config)
    many = CalibrationSpec(images={"source": "digits"}, samples=5000)
    with pytest.raises(CompressError, match="at least 5000 images"):
        calibration_batches(many, codebook, picture_config)
