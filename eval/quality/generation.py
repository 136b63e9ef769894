"""Samples of a masked generator over the number of sampler steps: their quality and their cost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import LongTensor, Tensor

from compress.errors import CompressError
from compress.eval.quality.classifier import STEPS, ImageClassifier
from compress.eval.quality.frechet import frechet_distance, frechet_error
from compress.eval.quality.generated_text import Scorer, generative_perplexity, unigram_entropy
from compress.eval.quality.pictures import picture_grid, png_base64
from compress.eval.quality.stats import clustered_mean

WHERE = "generation"
_SHOWN_ROWS, _SHOWN_UNCONDITIONAL = 4, 32  # pictures in the grid of a report


class Decoder(Protocol):
    """Tokens to pictures: a codebook."""

    def decode(self, tokens: Tensor) -> Tensor:
        """Ids [n, length] to float [n, height, width] in 0..1."""


@dataclass(frozen=True)
class RealImages:
    """Real images with classes, what generated ones are compared with.

    Attributes:
        name: of the data set.
        pixels, labels: float [n, height, width] in 0..1 and int64 [n]; the classifier learns from
            them, and distances are measured to them.
        test_pixels, test_labels: images that the classifier has not seen.
        steps: of the classifier's training.
    """

    name: str
    pixels: Tensor
    labels: Tensor
    test_pixels: Tensor
    test_labels: Tensor
    steps: int = STEPS

    @cached_property
    def classifier(self) -> ImageClassifier:
        """Trained when first asked for, once for all models that are compared."""
        return ImageClassifier(
            self.pixels, self.labels, self.test_pixels, self.test_labels, steps=self.steps
        )

    @cached_property
    def features(self) -> Any:
        return self.classifier.features(self.pixels)


@dataclass(frozen=True)
class Judges:
    """What generated samples are judged with; each part may be missing.

    Attributes:
        decoder, images: for models of images.
        scorer, to_text: for models of text; ``to_text`` turns ids [n, length] into strings.
    """

    decoder: Decoder | None = None
    images: RealImages | None = None
    scorer: Scorer | None = None
    to_text: Callable[[LongTensor], list[str]] | None = None


class ImageJudgement(BaseModel):
    """Generated images against real ones."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    frechet: float = Field(description="FD(<encoder>) to the real training images")
    frechet_stderr: float | None = Field(description="bootstrap over samples")
    accuracy: float | None = Field(
        description="share of samples that the classifier puts into the class that was asked for"
    )
    accuracy_stderr: float | None = None


class TextJudgement(BaseModel):
    """Generated text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    unigram_entropy: float = Field(description="nats, mean over samples")
    nll: float | None = Field(default=None, description="nats per token under the scorer")
    nll_stderr: float | None = None
    perplexity: float | None = Field(default=None, description="exp(nll): genPPL(<scorer>)")


class StepPoint(BaseModel):
    """Samples made in a given number of steps."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int
    evaluations: float = Field(
        description="network evaluations a sample; guidance doubles them, a cache saves some"
    )
    block_forwards: float = Field(description="transformer blocks run, per sample")
    token_block_forwards: float = Field(description="tokens times blocks, per sample")
    seconds: float = Field(description="wall time for all samples")
    images: ImageJudgement | None = None
    text: TextJudgement | None = None


class Encoder(BaseModel):
    """The classifier that judged images."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    data: str
    test_accuracy: float
    sha256: str
    frechet_floor: float = Field(description="FD of real images not trained on, for comparison")


class Picture(BaseModel):
    """A grid of samples."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    png: str = Field(description="base64", pattern=r"^[A-Za-z0-9+/]+={0,2}$")
    width: int
    height: int
    steps: int
    caption: str


class GenerationResult(BaseModel):
    """What :func:`generation_curve` measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    points: tuple[StepPoint, ...] = Field(min_length=1)
    samples: int
    length: int = Field(description="tokens generated in a sample")
    seed: int
    sampler: dict[str, Any] = Field(description="options of the sampler, all of them")
    encoder: Encoder | None = None
    scorer: str | None = None
    picture: Picture | None = None
    excerpts: tuple[str, ...] = Field(default=(), description="beginnings of some samples")


@dataclass(frozen=True)
class Drawn:
    """Samples at one number of steps, and what each of them cost.

    Attributes:
        tokens: int64 [samples, length], conditions and special tokens included.
        generated: int64 [samples, n], what the sampler produced.
        evaluations, block_forwards, token_block_forwards: per sample.
    """

    tokens: LongTensor
    generated: LongTensor
    evaluations: float
    block_forwards: float
    token_block_forwards: float


def generation_curve(
    draw: Callable[[int], Drawn],
    steps: Sequence[int],
    judges: Judges,
    *,
    classes: LongTensor | None = None,
    seed: int = 0,
    sampler: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> GenerationResult:
    """Draw samples in several numbers of steps and judge them.

    Args:
        draw: steps to samples; the same seeds at every call.
        steps: numbers of steps, at least one.
        classes: int64 [samples], the class of each sample.
        seed, sampler: kept with the result.

    Raises:
        CompressError: no steps, or what the sampler and the judges refuse.
    """
    if not steps:
        raise CompressError("at least one number of steps", "none", where=WHERE)
    points = []
    for number, count in enumerate(sorted(steps)):
        start = time.perf_counter()
        drawn = draw(count)
        points.append(
            StepPoint(
                steps=count,
                evaluations=drawn.evaluations,
                block_forwards=drawn.block_forwards,
                token_block_forwards=drawn.token_block_forwards,
                seconds=time.perf_counter() - start,
                images=_judge_images(judges, drawn.tokens, classes),
                text=_judge_text(judges, drawn.generated),
            )
        )
        if progress:
            progress(number + 1, len(steps))
    return GenerationResult(
        points=tuple(points),
        samples=len(drawn.tokens),
        length=drawn.generated.shape[1],
        seed=seed,
        sampler=sampler or {},
        encoder=_encoder(judges.images) if judges.decoder and judges.images else None,
        scorer=judges.scorer.name if judges.scorer else None,
        picture=_picture(judges.decoder, drawn.tokens, classes, count) if judges.decoder else None,
        excerpts=_excerpts(judges, drawn.generated),
    )


def _judge_images(
    judges: Judges, tokens: LongTensor, classes: LongTensor | None
) -> ImageJudgement | None:
    if judges.decoder is None or judges.images is None:
        return None
    pixels, real = judges.decoder.decode(tokens), judges.images
    features = real.classifier.features(pixels)
    found = ImageJudgement(
        frechet=frechet_distance(real.features, features),
        frechet_stderr=frechet_error(real.features, features),
        accuracy=None,
    )
    if classes is None:
        return found
    hits = (real.classifier.classify(pixels) == classes).double().tolist()
    accuracy, error = clustered_mean(hits, [1.0] * len(hits))
    return found.model_copy(update={"accuracy": accuracy, "accuracy_stderr": error})


def _judge_text(judges: Judges, tokens: LongTensor) -> TextJudgement | None:
    if judges.to_text is None:
        return None
    found = TextJudgement(unigram_entropy=unigram_entropy(tokens))
    if judges.scorer is None:
        return found
    nll, error, _ = generative_perplexity(judges.scorer, judges.to_text(tokens))
    scored = {"nll": nll, "nll_stderr": error, "perplexity": math.exp(min(nll, 700.0))}
    return found.model_copy(update=scored)


def _encoder(real: RealImages) -> Encoder:
    judge = real.classifier
    return Encoder(
        name=judge.name,
        data=real.name,
        test_accuracy=judge.accuracy,
        sha256=judge.digest,
        frechet_floor=frechet_distance(real.features, judge.features(real.test_pixels)),
    )


def _picture(
    decoder: Decoder, tokens: LongTensor, classes: LongTensor | None, steps: int
) -> Picture:
    """A column a class, or the first samples."""
    if classes is None:
        chosen = torch.arange(min(_SHOWN_UNCONDITIONAL, len(tokens)))
        columns = min(8, len(chosen))
        caption = f"{len(chosen)} samples in {steps} steps"
    else:
        kinds = classes.unique()
        each = min(_SHOWN_ROWS, min(int((classes == c).sum()) for c in kinds))
        ranks = torch.stack([(classes == c).nonzero()[:each, 0] for c in kinds], dim=1)
        chosen, columns = ranks.flatten(), len(kinds)
        caption = f"a column a class, {steps} steps"
    grid = picture_grid(decoder.decode(tokens[chosen]), columns)
    return Picture(
        png=png_base64(grid), width=grid.shape[1], height=grid.shape[0], steps=steps,
        caption=caption,
    )  # fmt: skip


def _excerpts(judges: Judges, tokens: LongTensor) -> tuple[str, ...]:
    if judges.to_text is None:
        return ()
    return tuple(text[:200] for text in judges.to_text(tokens[:3]))
