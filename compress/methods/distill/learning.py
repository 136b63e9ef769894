"""How a compressed model learns from the uncompressed one: a block from its outputs, or the whole
model from its predictions."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from compress.errors import CompressError
from compress.generators.description import is_masked_generator
from compress.methods.distill.parameters import opened
from compress.models.heads import head_of
from compress.train.language import DistillationOptions, other_width
from compress.train.options import TrainingOptions, compute_dtype
from compress.train.reconstruction import BlockWork, learn_outputs
from compress.train.source import BatchSource
from compress.train.teacher import CachedTeacher, ModelTeacher
from compress.train.teacher_cache import CachedWindows
from compress.train.whole import ModelWork, learn_language, training_source

_WORTH = 2  # windows are seen so often at least where asking the teacher once is faster


@dataclass(frozen=True)
class Teaching:
    """How a whole model is taught.

    Attributes:
        kind: ``live``: the teacher is in memory; ``cached``: it is asked once about each window;
            ``auto``: cached where that is possible and each window is seen twice or more.
        top: tokens that are told apart where it is cached.
    """

    distillation: DistillationOptions
    kind: Literal["auto", "live", "cached"]
    top: int

    def cached(self, windows: int, options: TrainingOptions, alive: str | None) -> bool:
        """Whether the teacher is asked once.

        Args:
            alive: why the model's teacher has to be at hand in every step, if it has.

        Raises:
            CompressError: it is to be asked once, and has to be at hand.
        """
        if alive is not None and self.kind == "cached":
            raise CompressError(
                "a language model whose windows are the same whenever they are seen, to cache what "
                "the teacher says of them", alive, "Set teacher: live",
            )  # fmt: skip
        if self.kind != "auto":
            return self.kind == "cached"
        seen = options.steps * options.batch
        return alive is None and not self.distillation.hidden and seen >= _WORTH * windows


def learn_block(
    work: BlockWork, parameters: dict[str, nn.Parameter], options: TrainingOptions
) -> None:
    """Train parameters of a block until it returns what the uncompressed model has there.

    Those are kept that were best on held-out batches. Metrics: the relative error there ``before``,
    at the ``end`` of learning and ``after`` all.

    Raises:
        CompressError: the uncompressed model's hidden states have another width.
    """
    if not parameters:
        return  # a block that the step leaves out
    mine, theirs = work.inputs.read(0).shape[-1], work.targets.read(0).shape[-1]
    if mine != theirs:
        raise other_width(mine, theirs, "Use scope: model, which learns from predictions")
    chosen = list(parameters.values())
    with opened(parameters):
        best = learn_outputs(
            work, chosen, options, prepare=lambda _moment: 0.0, settle=lambda: None
        )
    work.metrics |= best.metrics("distill")


def learn_model(
    work: ModelWork,
    parameters: dict[str, nn.Parameter],
    options: TrainingOptions,
    teaching: Teaching,
) -> None:
    """Train parameters of a model on the uncompressed model's predictions.

    Metric: ``distill.loss``, the mean of the last tenth of the steps.

    Raises:
        CompressError: no uncompressed model, or hidden states that cannot be compared with its.
    """
    if work.teacher is None:
        raise CompressError(
            "the uncompressed model as teacher", "none",
            "In Python, give it to compress.apply as teacher=",
        )  # fmt: skip
    generator = is_masked_generator(work.model.config)
    if generator and teaching.distillation.hidden:
        raise CompressError(
            "a language model, to compare hidden states", "a masked generator",
            "Set distillation.hidden: 0",
        )  # fmt: skip
    windows = training_source(work)
    chosen = list(parameters.values())
    with (
        opened(parameters),
        _taught(work, windows, options, teaching) as (source, teacher),
    ):
        work.metrics["distill.loss"] = learn_language(
            work, chosen, options, teaching.distillation, name="distill",
            prepare=lambda _moment: 0.0, taught_by=teacher, source=source,
        ).last_loss  # fmt: skip


@contextmanager
def _taught(
    work: ModelWork,
    windows: BatchSource,
    options: TrainingOptions,
    teaching: Teaching,
) -> Iterator[tuple[BatchSource, ModelTeacher | CachedTeacher]]:
    """What is learned from, and who teaches."""
    if not teaching.cached(len(windows), options, _alive(work.model)):
        yield windows, work.original(teaching.distillation)
        return
    precision = work.precision if options.precision == "auto" else options.precision
    dtype = compute_dtype(precision, work.device)
    with _folder(work.folder) as folder:
        source = CachedWindows(windows, folder, teaching.top, teaching.distillation.temperature)
        source.fill(
            lambda: work.original(teaching.distillation), work.device, dtype, work.guard,
            lambda done, count: work.progress and work.progress.update("teacher", done, count),
        )  # fmt: skip
        yield source, CachedTeacher()


def _alive(model: nn.Module) -> str | None:
    """Why a model's teacher has to be at hand, if it has."""
    if is_masked_generator(model.config):
        return "a masked generator, which learns at fresh masks"
    if head_of(model) is not None:
        return "a model with a head of labels, whose few answers are not worth a cache"
    return None


@contextmanager
def _folder(training: Path | None) -> Iterator[Path]:
    """Where a cache is: beside the training's checkpoints, or, where nothing is durable, in a
    folder that goes with the training."""
    if training is not None:
        yield training / "teacher"
        return
    with tempfile.TemporaryDirectory(prefix="compress-teacher-") as folder:
        yield Path(folder)


def restore(module: nn.Module, learned: dict[str, torch.Tensor]) -> None:
    """Put learned values into those parameters of a module that are there under their names."""
    there = dict(module.named_parameters())
    with torch.no_grad():
        for name in learned.keys() & there.keys():
            there[name].copy_(learned[name])
