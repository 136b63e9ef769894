"""Latency of two models on the same machine at the same time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from compress.errors import CompressError
from compress.eval.quality.stats import median_interval
from compress.models.images import image_tokens, random_image, reads_images
from compress.models.kind import kind_of
from compress.models.positions import positions_of


class PairedTimes(BaseModel):
    """One timed thing, before and after, run alternately."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    before: float = Field(description="median, seconds")
    after: float = Field(description="median, seconds")
    speedup: float = Field(description="median over the pairs of before / after; above 1 is faster")
    interval: tuple[float, float] = Field(
        description="interval of the speed-up (95 % from six pairs on)"
    )
    before_seconds: list[float]
    after_seconds: list[float]


class PairedLatency(BaseModel):
    """What :func:`paired_latency` measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prefill: PairedTimes = Field(
        description="one forward of prefill_tokens, or of an image, which has so many"
    )
    decode: PairedTimes | None = Field(
        description="one token with a key-value cache, after the prefill; None for masked models"
    )
    prefill_tokens: int
    decode_tokens: int
    repeats: int
    threads: int
    device: str
    dtype: tuple[str, str]


def paired_latency(
    model_a: nn.Module,
    model_b: nn.Module,
    prefill_tokens: int = 512,
    decode_tokens: int = 32,
    repeats: int = 7,
) -> PairedLatency:
    """Time two models alternately (A B, B A, A B, ...) and compare them pair by pair.

    A machine slows down and speeds up by tens of percent within minutes; two blocks of runs would
    measure that. In a pair both models meet the same machine, and swapping the order within a pair
    takes out what a run leaves behind. The first run of each model is not counted.

    Args:
        model_a, model_b: before and after, both causal or both masked.
        prefill_tokens: length of the forward; an image has the tokens that it has.
        decode_tokens: tokens decoded greedily after it, for causal models.
        repeats: pairs, at least 3.

    Raises:
        CompressError: fewer than 3 pairs, models of two kinds, or too long a prefill.
    """
    kinds = {kind_of(model_a), kind_of(model_b)}
    if repeats < 3 or len(kinds) > 1:
        raise CompressError(
            "at least 3 repeats of two models of the same kind",
            f"{repeats} repeats, {type(model_a).__name__} and {type(model_b).__name__}",
            where="latency",
        )
    decode = decode_tokens if kinds == {"causal"} else 0
    if all(reads_images(model.config) for model in (model_a, model_b)):
        prefill_tokens = image_tokens(model_b.config)
    for model in (model_a, model_b):
        _check_length(model, prefill_tokens + decode)
    seconds: tuple[list, list] = ([], [])
    with _evaluating(model_a), _evaluating(model_b):
        runs = [_runner(model, prefill_tokens, decode) for model in (model_a, model_b)]
        for run in runs:
            run()
        for pair in range(repeats):
            for side in (0, 1) if pair % 2 == 0 else (1, 0):
                seconds[side].append(runs[side]())
    return PairedLatency(
        prefill=_paired(*([s[0] for s in side] for side in seconds)),
        decode=_paired(*([s[1] for s in side] for side in seconds)) if decode else None,
        prefill_tokens=prefill_tokens,
        decode_tokens=decode,
        repeats=repeats,
        threads=torch.get_num_threads(),
        device=str(model_b.device),
        dtype=(str(model_a.dtype).split(".")[-1], str(model_b.dtype).split(".")[-1]),
    )


def _paired(before: list[float], after: list[float]) -> PairedTimes:
    speedup, bounds = median_interval([a / b for a, b in zip(before, after, strict=True)])
    return PairedTimes(
        before=statistics.median(before),
        after=statistics.median(after),
        speedup=speedup,
        interval=bounds,
        before_seconds=before,
        after_seconds=after,
    )


@contextmanager
def _evaluating(model: nn.Module):
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _check_length(model: nn.Module, tokens: int) -> None:
    positions = positions_of(model.config)
    if positions and tokens > positions:
        raise CompressError(
            f"prefill and decode within the model's {positions} positions",
            f"{tokens} tokens",
            "Set smaller prefill_tokens and decode_tokens",
            where="latency",
        )


def _inputs(model: nn.Module, tokens: int) -> dict[str, torch.Tensor]:
    """An image, or so many tokens."""
    if reads_images(model.config):
        return random_image(model.config)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(vocabulary, (1, tokens), generator=generator)}


def _runner(model: nn.Module, prefill: int, decode: int) -> Callable[[], tuple[float, float]]:
    """Return a function that runs one prefill and decode: (seconds, seconds per decoded token)."""
    inputs = {n: v.to(model.device) for n, v in _inputs(model, prefill).items()}
    # A server needs the last logits of a prefill only; a masked model is asked for all.
    extra = {"use_cache": True, "logits_to_keep": 1} if decode else {}

    def clock() -> float:
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        return time.perf_counter()

    @torch.no_grad()
    def run() -> tuple[float, float]:
        start = clock()
        output = model(**inputs, **extra)
        middle = clock()
        for _ in range(decode):
            token = output.logits[:, -1:].argmax(-1)
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        end = clock()
        return middle - start, (end - middle) / max(1, decode)

    return run
