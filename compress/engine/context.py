"""What a step works with: the model, its inputs, and a place for finished blocks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from compress.models.anatomy import BlockAnatomy
from compress.models.stream import StreamedModel
from compress.system.progress import Progress
from compress.train.options import Precision


class Sink(Protocol):
    """Where finished blocks go, and what is known of an interrupted run."""

    def finished(self, stage: str) -> int:
        """Number of leading blocks whose ``stage`` is done."""

    def notes(self, stage: str) -> list[Any]:
        """What ``record`` was given for the finished blocks."""

    def load(self, index: int, block: nn.Module) -> None:
        """Fill a block with the weights that enter the step."""

    def store(self, index: int, block: nn.Module, anatomy: BlockAnatomy) -> None:
        """Make the weights of a solved block durable."""

    def keep(self, stage: str, index: int, tensors: dict[str, torch.Tensor]) -> None:
        """Make what a stage learned of a block durable."""

    def learned(self, index: int) -> dict[str, torch.Tensor]:
        """What the latest stage that learned kept of a block; empty where none did."""

    def record(self, stage: str, index: int, note: Any, activations: dict[str, Any] | None) -> None:
        """Note that a block's ``stage`` is done, and what the next block starts from."""

    def activations(self, stage: str) -> dict[str, Any] | None:
        """The last ``activations`` given to ``record``."""

    def again(self, stage: str, why: str) -> None:
        """Take back all blocks of a stage, which cannot go on: what it left has been lost."""


class MemorySink:
    """The sink of a live model: blocks are what they are, nothing is durable."""

    def __init__(self) -> None:
        self._notes: dict[str, list[Any]] = {}
        self._learned: dict[int, dict[str, torch.Tensor]] = {}

    def finished(self, stage: str) -> int:
        return 0

    def notes(self, stage: str) -> list[Any]:
        return self._notes.get(stage, [])

    def load(self, index: int, block: nn.Module) -> None:
        """A live block holds its weights."""

    def store(self, index: int, block: nn.Module, anatomy: BlockAnatomy) -> None:
        """A live block keeps its weights."""

    def keep(self, stage: str, index: int, tensors: dict[str, torch.Tensor]) -> None:
        self._learned[index] = tensors

    def learned(self, index: int) -> dict[str, torch.Tensor]:
        return self._learned.get(index, {})

    def record(self, stage: str, index: int, note: Any, activations: dict[str, Any] | None) -> None:
        self._notes.setdefault(stage, []).append(note)

    def activations(self, stage: str) -> dict[str, Any] | None:
        return None

    def again(self, stage: str, why: str) -> None:
        """A live model is never gone on with."""


@dataclass
class StepContext:
    """What a step works with.

    Attributes:
        source: the model.
        batches: calibration batches (dicts of model inputs); may be empty for data-free methods.
        scratch: folder for activations.
        labels: for masked language models, the tokens behind the masks (-100 elsewhere), a tensor a
            batch; methods of model scope find them in their batches under ``labels``.
        folder: for training checkpoints; None where nothing is durable.
        seed: of everything random.
        progress: where learning tells how far it is.
        compute: dtype of matrix products in calibration passes; statistics and solvers work in
            float32.
        storage_dtype: dtype of unquantised values in the checkpoint that will be written.
        report: called with (stage, block index, number of blocks, note) after each block.
        guard: called before each block; raises when a limit is exceeded.
        joined: entered while the whole model trains; calls other processes to take part.
        precision: what ``precision: auto`` of a training means; settled when a run began.
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
