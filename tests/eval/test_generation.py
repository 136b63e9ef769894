"""Generated images and texts are judged by what is known of them."""

from __future__ import annotations

import base64
import math
import struct
import zlib

import numpy as np
import pytest
import torch
from torch import Tensor

from compress.errors import CompressError
from compress.eval.quality.classifier import ImageClassifier
from compress.eval.quality.frechet import frechet_distance, frechet_error, gaussian_distance
from compress.eval.quality.generated_text import Scorer, generative_perplexity, unigram_entropy
from compress.eval.quality.generation import (
    Drawn,
    GenerationResult,
    Judges,
    RealImages,
    generation_curve,
)
from compress.eval.quality.pictures import picture_grid, png


def bars(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy 8x8 pictures of a horizontal (0) or vertical (1) bar."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (n,), generator=generator)
    pixels = 0.2 * torch.rand(n, 8, 8, generator=generator)
    places = torch.randint(8, (n,), generator=generator)
    for picture, label, place in zip(pixels, labels, places, strict=True):
        (picture if label == 0 else picture.T)[place] += 0.7
    return pixels, labels


@pytest.fixture(scope="module")
def real() -> RealImages:
    return RealImages("bars", *bars(300, 0), *bars(100, 1), 200)


class Book:
    """Two codes: a picture is bar number code, whatever else is in the row."""

    def decode(self, tokens: Tensor) -> Tensor:
        pixels = torch.zeros(len(tokens), 8, 8)
        for picture, row in zip(pixels, tokens, strict=True):
            place = int(row[1]) % 8
            (picture if row[0] == 0 else picture.T)[place] = 0.8
        return pixels


class TestFrechet:
    def test_a_set_with_itself(self) -> None:
        features = np.random.default_rng(0).normal(size=(200, 5))
        assert frechet_distance(features, features) == pytest.approx(0, abs=1e-10)

    def test_closed_form_of_commuting_gaussians(self) -> None:
        mean, first, second = np.array([1.0, 2.0]), np.diag([1.0, 4.0]), np.diag([9.0, 16.0])
        # |m|^2 + sum (sqrt a - sqrt b)^2
        found = gaussian_distance(np.zeros(2), first, mean, second)
        assert found == pytest.approx(5 + (1 - 3) ** 2 + (2 - 4) ** 2)

    def test_the_trace_term_by_a_matrix_root(self) -> None:
        generator = np.random.default_rng(1)
        a, b = (x @ x.T for x in generator.normal(size=(2, 4, 6)))
        roots = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum()
        expected = np.trace(a) + np.trace(b) - 2 * roots
        assert gaussian_distance(np.zeros(4), a, np.zeros(4), b) == pytest.approx(expected)

    def test_a_shift_of_samples(self) -> None:
        features = np.random.default_rng(0).normal(size=(500, 3))
        assert frechet_distance(features, features + 2) == pytest.approx(12)
        assert 0 < frechet_error(features, features + 2) < 2
        assert frechet_distance(features[:, :1], features[:, :1] + 2) == pytest.approx(4)

    def test_refusals(self) -> None:
        good = np.zeros((3, 2))
        with pytest.raises(CompressError, match="same d"):
            frechet_distance(good, np.zeros((3, 4)))
        with pytest.raises(CompressError, match="two rows"):
            frechet_distance(good, good[:1])
        with pytest.raises(CompressError, match="finite"):
            frechet_distance(good, good * np.nan)


class TestClassifier:
    def test_it_learns_states_its_accuracy_and_repeats(self, real: RealImages) -> None:
        state = torch.random.get_rng_state()
        judge = real.classifier
        assert torch.equal(state, torch.random.get_rng_state())
        assert judge.accuracy > 0.95
        pixels, labels = bars(100, 2)
        assert (judge.classify(pixels) == labels).float().mean() > 0.95
        assert judge.features(pixels).shape == (100, 32)
        assert judge.features(pixels).dtype == np.float64

    def test_refusals(self, real: RealImages) -> None:
        with pytest.raises(CompressError, match="8x8"):
            real.classifier.features(torch.zeros(2, 9, 9))
        pixels, labels = bars(10, 0)
        with pytest.raises(CompressError, match="n labels"):
            ImageClassifier(pixels, labels[:5], pixels, labels)
        with pytest.raises(CompressError, match="two classes"):
            ImageClassifier(pixels, labels * 0, pixels, labels)


def curve(real: RealImages, wrong: int, **options) -> GenerationResult:
    """100 samples whose last ``wrong`` are of the other class."""
    classes = torch.arange(100) % 2

    def draw(steps: int) -> Drawn:
        tokens = torch.stack([classes.clone(), torch.arange(100)], dim=1)
        tokens[100 - wrong :, 0] = 1 - tokens[100 - wrong :, 0]
        return Drawn(tokens, tokens[:, 1:], steps, 4 * steps, 8 * steps)

    judges = Judges(decoder=Book(), images=real)
    return generation_curve(draw, [4, 2], judges, classes=classes, **options)


def test_samples_of_the_wrong_class_are_counted(real: RealImages) -> None:
    found = curve(real, 20, seed=5)
    assert [p.steps for p in found.points] == [2, 4]
    assert [p.evaluations for p in found.points] == [2, 4]
    assert found.points[1].token_block_forwards == 32
    assert found.points[0].images.accuracy == pytest.approx(0.8, abs=0.04)
    assert found.points[0].images.frechet > found.encoder.frechet_floor > 0
    assert found.encoder.test_accuracy == real.classifier.accuracy
    assert found.encoder.data == "bars" and found.samples == 100 and found.length == 1
    assert GenerationResult.model_validate_json(found.model_dump_json()) == found
    with pytest.raises(CompressError, match="number of steps"):
        generation_curve(lambda n: None, [], Judges())


def test_the_picture_has_a_column_a_class(real: RealImages) -> None:
    picture = curve(real, 0).picture
    assert (picture.width, picture.height) == (2 * 9 - 1, 4 * 9 - 1)
    grey = read_png(base64.b64decode(picture.png))
    assert grey.shape == (picture.height, picture.width)
    # The first sample of class 0 is the horizontal bar in row 0, the first of class 1 is vertical.
    assert (grey[0, :8] == 204).all() and (grey[:8, 9 + 1] == 204).all()


def read_png(data: bytes) -> np.ndarray:
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(
            kind + body
        )
        chunks[kind], at = body, at + 12 + size
    wide, high = struct.unpack(">II", chunks[b"IHDR"][:8])
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(high, wide + 1)
    assert not rows[:, 0].any()  # no filter
    return rows[:, 1:]


def test_png_keeps_every_grey() -> None:
    grey = torch.arange(256, dtype=torch.uint8).view(8, 32)
    assert (read_png(png(grey)) == grey.numpy()).all()


def test_a_grid_with_a_short_last_row() -> None:
    grid = picture_grid(torch.ones(3, 2, 2), columns=2)
    full, short = [255, 255, 128, 255, 255], [255, 255, 128, 128, 128]
    assert grid.tolist() == [full, full, [128] * 5, short, short]


class TestText:
    def test_unigram_entropy(self) -> None:
        assert unigram_entropy(torch.tensor([[3, 3, 3, 3]])) == 0
        rows = torch.tensor([[1, 2, 3, 4], [1, 1, 2, 2]])
        assert unigram_entropy(rows) == pytest.approx((math.log(4) + math.log(2)) / 2)

    def test_generative_perplexity_by_hand(self, tiny, tokenizer) -> None:
        model, texts = tiny("llama"), ["the river", "a stone wall"]
        nll, error, scored = generative_perplexity(Scorer("s", model, tokenizer), texts)
        means = []
        for text in texts:
            ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
            with torch.no_grad():
                logs = model(ids).logits[:, :-1].log_softmax(-1)
            means.append(-logs.gather(2, ids[:, 1:, None]).mean().item())
        assert nll == pytest.approx(sum(means) / 2, rel=1e-5)
        assert error > 0 and scored == 2

    def test_refusals(self, tiny, tokenizer) -> None:
        with pytest.raises(CompressError, match="causal"):
            generative_perplexity(Scorer("s", tiny("bert"), tokenizer), ["a"])
        tokenizer_without = type("T", (), {"bos_token_id": None})()
        tokenizer_without.__class__.__call__ = lambda self, *a, **k: {"input_ids": [1]}
        with pytest.raises(CompressError, match="two tokens"):
            generative_perplexity(Scorer("s", tiny("llama"), tokenizer_without), ["a"])
