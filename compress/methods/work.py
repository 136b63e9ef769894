"""What a method is given to work on: a site, a surveyed block, a block or a model to train."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.linear.layer import parts_of
from compress.linear.matrix import matrix
from compress.linear.statistics import InputStatistics
from compress.models.anatomy import Anatomy, BlockAnatomy, Site
from compress.models.replay import BlockCall
from compress.system.activations import Activations
from compress.system.progress import Progress
from compress.train.options import Precision


@dataclass
class SiteWork:
    """One site of one block, as a method gets it to solve.

    Attributes:
        block, anatomy, site: where it is.
        names: the linears of the site that the step targets.
        statistics: of the inputs, by linear; linears of one site share an object. Empty for
            methods that need none.
        decision: what an earlier pass of the step decided, None where none did.
        storage_dtype: what the checkpoint stores floats in; scales must survive the rounding to it.
        kept_columns: set by a method that removed input features of an output projection: the
            indices that stay (the engine narrows the stored activations accordingly).
        learned: what an earlier pass of the step kept of this block, by name.
        metrics: figures for the journal, set by the method.
    """

    block: nn.Module
    anatomy: BlockAnatomy
    site: Site
    names: tuple[str, ...]
    statistics: dict[str, InputStatistics] = field(default_factory=dict)
    decision: Any = None
    storage_dtype: torch.dtype = torch.float32
    kept_columns: torch.Tensor | None = None
    learned: dict[str, torch.Tensor] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    def linear(self, name: str) -> nn.Module:
        return self.block.get_submodule(name)

    def weight(self, name: str) -> torch.Tensor:
        """The weight as a matrix [out, in] that writes through to the module."""
        return matrix(self.linear(name))

    def replace(self, name: str, module: nn.Module) -> None:
        """Put another module in the place of a linear."""
        parent, _, leaf = name.rpartition(".")
        setattr(self.block.get_submodule(parent), leaf, module)

    def groups(self) -> Iterator[tuple[list[str], InputStatistics | None]]:
        """Yield targeted linears that read the same input, with the statistics of that input.

        A layer counts as the linears that it is made of. Each reads what the one before it makes,
        so it comes afterwards, with statistics carried through the others as they are by then.
        """
        by_statistics: dict[int, tuple[InputStatistics | None, list[str]]] = {}
        for name in self.names:
            stats = self.statistics.get(name)
            first = parts_of(self.linear(name), name)[:1]
            by_statistics.setdefault(id(stats), (stats, []))[1].extend(first)
        for stats, paths in by_statistics.values():
            yield paths, stats
        for name in self.names:
            layer, stats = self.linear(name), self.statistics.get(name)
            for number, path in enumerate(parts_of(layer, name)[1:], 1):
                yield [path], None if stats is None else layer.carried(stats, number)

    def label(self, name: str) -> str:
        """How to name a linear in a message."""
        return f"{self.anatomy.path}.{name}"


@dataclass
class BlockSurvey:
    """What a survey saw of one uncompressed block.

    Attributes:
        statistics: by linear, for the sites the method asked for.
        influence: 1 - mean cosine similarity between the block's input and output (ShortGPT).
        block: the block itself, valid during ``observe`` only.
    """

    anatomy: BlockAnatomy
    block: nn.Module
    statistics: dict[str, InputStatistics]
    influence: float


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
