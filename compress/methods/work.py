"""What a method is given to work on without gradients: a site, a block that is surveyed, a group of
blocks that become one, or what lies outside the blocks.

A block or a model to train is a :class:`compress.train.reconstruction.BlockWork` or a
:class:`compress.train.whole.ModelWork`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from compress.linear.layer import parts_of
from compress.linear.matrix import matrix
from compress.linear.statistics import InputStatistics
from compress.models.anatomy import Anatomy, BlockAnatomy, Site
from compress.models.replay import BlockCall
from compress.system.activations import Activations


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
        seed: the run's.
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
    seed: int = 0

    def linear(self, name: str) -> nn.Module:
        return self.block.get_submodule(name)

    def weight(self, name: str) -> torch.Tensor:
        """The weight as a matrix [out, in] that writes through to the module."""
        return matrix(self.linear(name))

    def replace(self, name: str, module: nn.Module) -> None:
        """Put another module in the place of a linear."""
        self.block.set_submodule(name, module)

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
            if paths:  # layers that cannot be taken apart have none
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
        inputs: hidden states that enter the block, a calibration batch an entry; likewise.
        calls: how the model calls the block, one entry a batch.
        outputs: hidden states that leave the block.
        last: whether no block follows.
        detours: of blocks up to this one that the pass also leaves out: index -> the hidden states
            that leave this block in a model without that one, a batch after the other.
        kept: tensors that the observation of a later block is to find, by name; set by ``observe``.
        earlier: index of an earlier block -> what was kept there.
    """

    anatomy: BlockAnatomy
    block: nn.Module
    statistics: dict[str, InputStatistics]
    influence: float
    inputs: Activations
    calls: list[BlockCall]
    earlier: Callable[[int], dict[str, torch.Tensor]]
    outputs: Activations
    last: bool
    detours: dict[int, Iterator[torch.Tensor]] = field(default_factory=dict)
    kept: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class GroupWork:
    """Neighbouring blocks that are to become one, all of them in memory.

    Attributes:
        blocks, anatomies: in order, with their weights in float32.
        config: of the model, for a block that its class has to build anew.
        inputs: hidden states that enter the first block, a calibration batch an entry, from the
            blocks in front of it as they are by now; None where the pass carries none along.
        calls: how the model calls each of the blocks, [block][batch]; empty without inputs.
        device: where the blocks live.
        decision: what an earlier pass of the step decided, None where none did.
        learned: what an earlier pass of the step kept of each block, by name.
        metrics: figures for the journal, set by the method.
    """

    blocks: list[nn.Module]
    anatomies: list[BlockAnatomy]
    config: PreTrainedConfig
    inputs: Activations | None
    calls: list[list[BlockCall]]
    device: torch.device
    decision: Any = None
    learned: list[dict[str, torch.Tensor]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)


def _no_inputs() -> Iterator[torch.Tensor]:
    return iter(())


@dataclass
class OuterWork:
    """What lies outside the blocks, to be changed: embeddings, final norm, head.

    Attributes:
        model: its outer modules have their weights, in float32; its blocks do not.
        anatomy: of the model as it is before the change.
        decision: what an earlier pass of the step decided, None where none did.
        learned: what an earlier pass of the step kept of what lies outside the blocks, by name.
        storage_dtype: as in :class:`SiteWork`.
        head_inputs: what enters the head, [tokens, hidden size] a calibration batch, without
            padding, from the blocks as they are by now; empty where the model has no head that
            predicts tokens, before the first block, and where the pass carries no inputs along.
    """

    model: PreTrainedModel
    anatomy: Anatomy
    decision: Any = None
    learned: dict[str, torch.Tensor] = field(default_factory=dict)
    storage_dtype: torch.dtype = torch.float32
    head_inputs: Callable[[], Iterator[torch.Tensor]] = _no_inputs
