"""A whole model learns from its own loss, with the dense model as its teacher or without.

The parameters that learn are the method's; the model's kind decides the loss: next tokens, hidden
tokens, or a masked generator's.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.generators.description import is_masked_generator
from compress.models.anatomy import Anatomy
from compress.system.progress import Progress
from compress.train.generator import GeneratorLoss
from compress.train.language import DistillationOptions, LanguageLoss
from compress.train.loop import fit
from compress.train.moment import Moment
from compress.train.options import Precision, TrainingOptions
from compress.train.source import BatchSource, TokenSource
from compress.train.teacher import ModelTeacher, Teacher


@dataclass
class ModelWork:
    """A whole model, as a method gets it to learn on.

    Attributes:
        model, anatomy: in float32 on ``device``, its parameters not requiring gradients.
        batches: calibration batches; ``labels`` among them for masked language models.
        folder: for training checkpoints; None where nothing is durable.
        seed: seed of all random numbers.
        progress: where to tell how far it is. guard: raises when a limit is exceeded.
        precision: what ``precision: auto`` of a training means.
        metrics: figures and other plain data for the journal, set by the method.
        storage_dtype: what the checkpoint stores floats in.
        teacher: loads the model that the recipe began with: whole, in float32, in evaluation mode,
            on ``device``, without gradients; None where there is none.
        origins: a pair a block: it stands for the blocks first to stop - 1 of that model, so what
            it returns is compared with what block stop - 1 returns.
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
    origins: list[tuple[int, int]] = field(default_factory=list)
    storage_dtype: torch.dtype = torch.float32


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
) -> float:
    """Train parameters of a model, or of modules in it, on the model's own loss.

    Args:
        parameters: or groups of them, as :func:`compress.train.loop.fit` takes them.
        name: of the training, for its checkpoints.
        prepare: called before each micro-batch, to make weights of what is learned; returns what
            the loss is less (a reward), or 0.
        teacher: inside it the model is its own teacher, the dense model: a forward pass more a
            step, and no memory.
        taught_by: another teacher; a masked generator's is a :class:`.teacher.ModelTeacher`.
        source: of what is learned from; by default the calibration batches.

    Returns:
        The mean loss of the last tenth of the steps.
    """
    if is_masked_generator(work.model.config):
        other = taught_by.model if isinstance(taught_by, ModelTeacher) else None
        language = GeneratorLoss(work.model, distillation, other)
    else:
        language = LanguageLoss(work.model, work.anatomy, distillation, taught_by)

    def loss(_module: nn.Module, batch: dict[str, torch.Tensor], moment: Moment):
        batch, observed = language.prepare(batch, moment), None
        if distillation is not None:
            with teacher(), torch.no_grad():
                observed = language.observe(batch)
        reward = prepare(moment)
        value, figures = language(batch, observed)
        return value - reward, figures

    result = fit(
        work.model, loss, source or token_windows(work.batches), options, parameters=parameters,
        folder=work.folder, seed=work.seed, name=name, progress=work.progress, guard=work.guard,
        device=work.device, auto=work.precision,
    )  # fmt: skip
    last = result.history[-max(1, options.steps // 10) :]
    return sum(line["loss"] for line in last) / len(last)


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
