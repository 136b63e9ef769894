"""What a method that learns by gradients is given, and what it asks of the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from compress.models.anatomy import Anatomy, BlockAnatomy
from compress.models.replay import BlockCall
from compress.system.activations import Activations
from compress.system.progress import Progress
from compress.train.options import Precision


@dataclass(frozen=True)
class Learning:
    """How gradients take part in a step.

    Attributes:
        blocks: each block learns by itself while it streams.
        model: the whole model learns together, after all blocks have been passed.
        targets: what a block is to reproduce: ``dense``, the outputs of the uncompressed model, or
            ``prefix``, what the uncompressed block makes of the inputs that reach it now.
        observes: on how many calibration batches, at most, the statistics are collected that
            learning starts from; 0 where it needs none.
        updates: the weights of each site change in closed form when all has been learned.
        tunes: each block's weights learn when all else has been learned.
    """

    blocks: bool
    model: bool
    targets: str = "dense"
    observes: int = 0
    updates: bool = False
    tunes: bool = False


@dataclass
class BlockWork:
    """One block, as a method gets it to learn on.

    Attributes:
        block, anatomy: in float32, its parameters not requiring gradients.
        inputs: hidden states that enter the block, from the compressed blocks in front of it; a
            calibration batch an entry.
        targets: what the block is to return for them.
        calls: how the model calls the block, an entry a batch.
        device: where the block lives.
        seed: of everything random; another one for each block.
        guard: raises when a limit of the run is exceeded.
        precision: what ``precision: auto`` of a training means.
        metrics: figures for the journal, set by the method.
    """

    block: nn.Module
    anatomy: BlockAnatomy
    inputs: Activations
    targets: Activations
    calls: list[BlockCall]
    device: torch.device
    seed: int
    guard: Callable[[], None] = lambda: None
    precision: Precision = "auto"
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class ModelWork:
    """A whole model, as a method gets it to learn on.

    Attributes:
        model, anatomy: in float32 on ``device``, its parameters not requiring gradients.
        batches: calibration batches; ``labels`` among them for masked language models.
        folder: for training checkpoints; None where nothing is durable.
        seed: of everything random.
        progress: where to tell how far it is. guard: raises when a limit is exceeded.
        precision: what ``precision: auto`` of a training means.
        metrics: figures for the journal, set by the method.
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
    metrics: dict[str, float] = field(default_factory=dict)
