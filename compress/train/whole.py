"""A whole model learns from its own loss, with the dense model as its teacher or without.

The parameters that learn are the method's; the model's kind decides the loss (:func:`model_loss`):
next tokens, hidden tokens, a masked generator's, or labels. So a method that trains a whole model
works on all of them without knowing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from compress.errors import CompressError
from compress.generators.description import is_masked_generator
from compress.models.anatomy import Anatomy, anatomy_of
from compress.models.heads import head_of
from compress.models.images import PIXELS
from compress.models.inputs import ImageRows, Rows
from compress.system.progress import Progress
from compress.train.generator import GeneratorLoss
from compress.train.labels import LabelLoss
from compress.train.language import DistillationOptions, LanguageLoss, compared_layers
from compress.train.loop import TrainingResult, fit
from compress.train.moment import Moment
from compress.train.options import Precision, TrainingOptions
from compress.train.source import BatchSource, TokenSource
from compress.train.teacher import ModelTeacher, Teacher


@dataclass
class ModelWork:
    """A whole model, as a method gets it to learn on.

    Attributes:
        model, anatomy: in float32 on ``device``, its parameters not requiring gradients.
        batches: calibration batches; ``labels`` among them for masked language models and models
            with a head of labels.
        folder: for training checkpoints; None where nothing is durable.
        seed: seed of all random numbers.
        progress: where to tell how far it is. guard: raises when a limit is exceeded.
        precision: what ``precision: auto`` of a training means.
        metrics: figures and other plain data for the journal, set by the method.
        storage_dtype: what the checkpoint stores floats in.
        teacher: loads the model that the recipe began with: whole, in float32, in evaluation mode,
            on ``device``, without gradients; None where there is none.
        origins: a pair a block: it stands for the blocks first to stop - 1 of that model, so what
            it returns is compared with what block stop - 1 returns; None where that is not known.
    """

    model: nn.Module
    anatomy: Anatomy
    batches: list[dict[str, torch.Tensor]]
    device: torch.device
    folder: Path | None
    seed: int
    progress: Progress | None = None
    guard: Callable[[], None] = lambda: None
    precision: Precision = "auto"
    metrics: dict[str, Any] = field(default_factory=dict)
    teacher: Callable[[], nn.Module] | None = None
    origins: list[tuple[int, int]] | None = field(default_factory=list)
    storage_dtype: torch.dtype = torch.float32

    def original(self, distillation: DistillationOptions) -> ModelTeacher:
        """The model that the recipe began with, as the teacher of this one.

        Raises:
            CompressError: there is none, or hidden states are to be compared and nothing says
                which blocks of a teacher of another depth these are.
        """
        if self.teacher is None:
            raise CompressError(
                "the uncompressed model as teacher", "none",
                "In Python, give it to compress.apply as teacher=",
            )  # fmt: skip
        compared = compared_layers(distillation, len(self.anatomy.blocks))
        if compared and self.origins is None:
            raise other_depth("whose hidden states are compared")
        layers = {i: self.origins[i][1] - 1 for i in compared} if self.origins else {}
        model = self.teacher()
        return ModelTeacher(model, anatomy_of(model), layers)


def other_depth(what: str) -> CompressError:
    """Of a teacher that has another number of blocks than the model."""
    return CompressError(
        f"a teacher with as many blocks as the model, {what}", "another number",
        "Give the steps that dropped or merged blocks to the same call, with the model as it was "
        "before them, or learn as a whole model from predictions alone",
    )  # fmt: skip


class ModelLoss(Protocol):
    """The loss of a kind of model."""

    def prepare(self, batch: dict[str, torch.Tensor], moment: Moment) -> dict[str, torch.Tensor]:
        """A batch as the model learns from it in one step."""

    def observe(self, batch: dict[str, torch.Tensor]) -> Any:
        """What the teacher says of a prepared batch; called without gradients."""

    def __call__(
        self, batch: dict[str, torch.Tensor], lesson: Any = None
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss of a prepared batch (a scalar) and its parts by name."""


def model_loss(
    model: nn.Module,
    anatomy: Anatomy,
    distillation: DistillationOptions | None = None,
    taught_by: Teacher | None = None,
) -> ModelLoss:
    """The loss that fits a model's kind.

    Args:
        distillation: None to learn from the data alone.
        taught_by: by default the model itself, as it is when it is asked. Masked generators and
            models with a head of labels take a :class:`.teacher.ModelTeacher`.
    """
    other = taught_by if isinstance(taught_by, ModelTeacher) else None
    if is_masked_generator(model.config):
        return GeneratorLoss(model, distillation, other and other.model)
    if head_of(model) is not None:
        return LabelLoss(model, anatomy, distillation, other)
    return LanguageLoss(model, anatomy, distillation, taught_by)


def learn_language(
    work: ModelWork,
    parameters: list[nn.Parameter] | list[dict[str, Any]],
    options: TrainingOptions,
    distillation: DistillationOptions | None,
    *,
    name: str,
    prepare: Callable[[Moment], torch.Tensor | float],
    teacher: Callable[[], AbstractContextManager[None]] = nullcontext,
    taught_by: Teacher | None = None,
    source: BatchSource | None = None,
    held: Mapping[str, torch.Tensor] | None = None,
) -> TrainingResult:
    """Train parameters of a model, or of modules in it, on the model's own loss.

    Args:
        parameters: or groups of them, as :func:`compress.train.loop.fit` takes them.
        name: of the training, for its checkpoints.
        prepare: called before each micro-batch, to make weights of what is learned; returns what
            the loss is less (a reward), or 0.
        teacher: inside it the model is its own teacher, the dense model: a forward pass more a
            step, and no memory.
        taught_by: another teacher, see :func:`model_loss`.
        source: of what is learned from; by default the calibration batches.
        held: what ``prepare`` changes, as :func:`compress.train.loop.fit` takes it.

    Returns:
        What :func:`compress.train.loop.fit` does, with the loss of each step.
    """
    measured = model_loss(work.model, work.anatomy, distillation, taught_by)

    def loss(_module: nn.Module, batch: dict[str, torch.Tensor], moment: Moment):
        batch, observed = measured.prepare(batch, moment), None
        if distillation is not None:
            with teacher(), torch.no_grad():
                observed = measured.observe(batch)
        reward = prepare(moment)
        value, figures = measured(batch, observed)
        return value - reward, figures

    return fit(
        work.model, loss, source or training_source(work), options, parameters=parameters,
        folder=work.folder, seed=work.seed, name=name, progress=work.progress, guard=work.guard,
        device=work.device, auto=work.precision, held=held,
    )  # fmt: skip


def training_source(work: ModelWork) -> BatchSource:
    """The calibration batches as examples: rows of unequal length or images for a head of labels,
    else windows of tokens."""
    if PIXELS in work.batches[0]:
        return ImageRows.of_batches(work.batches)
    if head_of(work.model) is not None:
        padding = work.model.config.get_text_config().pad_token_id
        return Rows.of_batches(work.batches, padding or 0)
    return token_windows(work.batches)


def token_windows(batches: list[dict[str, torch.Tensor]]) -> TokenSource:
    """Calibration batches, one after the other, as windows of one source; short ones are padded."""
    longest = max(b["input_ids"].shape[1] for b in batches)

    def joined(tensors: list[torch.Tensor], padding: int) -> torch.Tensor:
        wide = [nn.functional.pad(t, (0, longest - t.shape[1]), value=padding) for t in tensors]
        return torch.cat(wide).cpu()

    ids = [b["input_ids"] for b in batches]
    labels = [b["labels"] for b in batches if "labels" in b]
    seen = [b.get("attention_mask", torch.ones_like(b["input_ids"])) for b in batches]
    padded = any("attention_mask" in b or b["input_ids"].shape[1] < longest for b in batches)
    return TokenSource(
        joined(ids, 0),
        joined(labels, -100) if len(labels) == len(batches) else None,
        joined(seen, 0) if padded else None,
    )
