"""What a step works with: the model, its inputs, and a place for finished blocks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from compress.engine.original import Original
from compress.models.anatomy import BlockAnatomy
from compress.models.groups import Groups
from compress.models.stream import StreamedModel
from compress.system.progress import Progress
from compress.train.options import Precision

OUTER = -1  # the "block" under which is kept what was learned outside the blocks


class Sink(Protocol):
    """Where finished blocks go, and what is known of an interrupted run.

    A stage is a pass of the step as journals name it, see
    :func:`compress.methods.questions.stages`. Indices of what is finished count the blocks that a
    stage makes; indices of what is loaded count the blocks as they are before it.
    """

    def finished(self, stage: str) -> int:
        """Number of leading blocks whose ``stage`` is done."""

    def notes(self, stage: str) -> list[Any]:
        """What ``record`` was given for the finished blocks, an entry a call."""

    def load(self, index: int, block: nn.Module) -> None:
        """Fill a block with the weights that enter the pass."""

    def store(self, stage: str, index: int, block: nn.Module, anatomy: BlockAnatomy) -> None:
        """Make the weights of a block that a stage has made durable."""

    def touch_outer(self, model: PreTrainedModel) -> None:
        """Told before what lies outside the blocks of a model is changed."""

    def store_outer(self, stage: str, model: PreTrainedModel) -> None:
        """Make what lies outside the blocks durable, as a stage has changed it."""

    def keep(self, stage: str, index: int, tensors: dict[str, torch.Tensor]) -> None:
        """Make what a stage learned of a block (or ``OUTER``) durable."""

    def learned(self, stage: str, index: int) -> dict[str, torch.Tensor]:
        """What a stage kept of a block (or ``OUTER``)."""

    def record(
        self,
        stage: str,
        index: int,
        note: Any,
        activations: dict[str, Any] | None,
        blocks: int = 1,
    ) -> None:
        """Note that the ``stage`` of a block, or of so many from it on, is done, and what the next
        block starts from."""

    def activations(self, stage: str) -> dict[str, Any] | None:
        """The last ``activations`` given to ``record``."""

    def again(self, stage: str, why: str) -> None:
        """Take back all blocks of a stage, which cannot go on: what it left has been lost."""

    def changed(self, stage: str, groups: Groups, source: StreamedModel) -> StreamedModel:
        """Take up what a finished stage has made of the model; what it is now.

        Args:
            groups: the blocks that each block of the result was made from.
            source: the model as it entered the stage.
        """

    def origins(self) -> list[tuple[int, int]] | None:
        """The blocks (first, end) that each block stands for in the model that a recipe began
        with; empty where each stands for itself, None where nothing is known of it."""


class MemorySink:
    """The sink of a live model: blocks are what they are, nothing is durable."""

    def __init__(self) -> None:
        self._notes: dict[str, list[Any]] = {}
        self._learned: dict[tuple[str, int], dict[str, torch.Tensor]] = {}

    def finished(self, stage: str) -> int:
        return 0

    def notes(self, stage: str) -> list[Any]:
        return self._notes.get(stage, [])

    def load(self, index: int, block: nn.Module) -> None:
        """A live block holds its weights."""

    def store(self, stage: str, index: int, block: nn.Module, anatomy: BlockAnatomy) -> None:
        """A live block keeps its weights."""

    def touch_outer(self, model: PreTrainedModel) -> None:
        """Nothing is kept of what was."""

    def store_outer(self, stage: str, model: PreTrainedModel) -> None:
        """A live model keeps its weights."""

    def keep(self, stage: str, index: int, tensors: dict[str, torch.Tensor]) -> None:
        self._learned[stage, index] = tensors

    def learned(self, stage: str, index: int) -> dict[str, torch.Tensor]:
        return self._learned[stage, index]

    def record(
        self,
        stage: str,
        index: int,
        note: Any,
        activations: dict[str, Any] | None,
        blocks: int = 1,
    ) -> None:
        self._notes.setdefault(stage, []).append(note)

    def activations(self, stage: str) -> dict[str, Any] | None:
        return None

    def again(self, stage: str, why: str) -> None:
        """A live model is never gone on with."""

    def changed(self, stage: str, groups: Groups, source: StreamedModel) -> StreamedModel:
        """Blocks have changed in place; their number is the owner's to change."""
        return source

    def origins(self) -> list[tuple[int, int]] | None:
        return []


@dataclass(frozen=True)
class Learned:
    """What a pass has kept of the blocks, and perhaps of what lies outside them.

    Attributes:
        outer: whether anything was kept outside the blocks.
    """

    sink: Sink
    stage: str
    outer: bool = False

    def block(self, index: int) -> dict[str, torch.Tensor]:
        return self.sink.learned(self.stage, index)

    def outside(self) -> dict[str, torch.Tensor]:
        return self.sink.learned(self.stage, OUTER) if self.outer else {}


@dataclass
class StepContext:
    """What a step works with.

    Attributes:
        source: the model; another object after each pass that has changed it.
        batches: calibration batches (dicts of model inputs); may be empty for data-free methods.
        scratch: folder for activations.
        labels: for masked language models, the tokens behind the masks (-100 elsewhere), a tensor a
            batch; methods of model scope find them in their batches under ``labels``.
        folder: for training checkpoints; None where nothing is durable.
        seed: of noise, orders of samples and new weights; starting points may have their own.
        progress: where learning tells how far it is.
        compute: dtype of matrix products in calibration passes; statistics and solvers work in
            float32.
        storage_dtype: dtype of unquantised values in the checkpoint that will be written.
        report: called with (stage, block index, number of blocks, note) after each block.
        guard: called before each block; raises when a limit is exceeded.
        joined: entered while the whole model trains; calls other processes to take part.
        precision: what ``precision: auto`` of a training means; settled when a run began.
        original: the model that the recipe began with; None where no step asks for it.
        learned: where the latest pass that learned has kept it; None where none did.
        groups: the blocks, as they entered the step, that each block was made from; None as long as
            each is what became of one.
    """

    source: StreamedModel
    batches: list[dict[str, torch.Tensor]]
    scratch: Path
    labels: list[torch.Tensor] | None = None
    folder: Path | None = None
    seed: int = 0
    progress: Progress | None = None
    compute: torch.dtype = torch.float32
    storage_dtype: torch.dtype = torch.float32
    sink: Sink = field(default_factory=MemorySink)
    report: Callable[[str, int, int, Any], None] = lambda *_: None
    guard: Callable[[], None] = lambda: None
    joined: Callable[[], AbstractContextManager[None]] = nullcontext
    precision: Precision = "auto"
    original: Original | None = None
    learned: Learned | None = None
    groups: Groups | None = None


def fill_whole(context: StepContext) -> list[dict[str, torch.Tensor]]:
    """Bring the whole model into memory; returns the batches where it is, labels among them."""
    source = context.source
    source.fill_outer()
    for index in range(len(source.anatomy.blocks)):
        context.sink.load(index, source.block(index))
    source.model.to(source.device)
    batches = [{k: v.to(source.device) for k, v in batch.items()} for batch in context.batches]
    for batch, labels in zip(batches, context.labels or (), strict=False):
        batch["labels"] = labels.to(source.device)
    return batches


def release_whole(context: StepContext) -> None:
    for index in range(len(context.source.anatomy.blocks)):
        context.source.release_block(index)
    context.source.release_outer()


def hidden_file(context: StepContext, stage: str, index: int) -> Path:
    """Where the hidden states that enter a block are while a stage streams."""
    return context.scratch / f"{stage}-hidden-{index:05d}.bin"
