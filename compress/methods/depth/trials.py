"""A model without one of its blocks, tried for each of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import nn

from compress.models.anatomy import Anatomy
from compress.models.stream import capture_inputs


class _Memory:
    """Takes what ``capture_inputs`` would write to a file."""

    def __init__(self) -> None:
        self.values: list[torch.Tensor] = []

    def write(self, _index: int, value: torch.Tensor) -> None:
        self.values.append(value.detach().clone())


class Trials:
    """Runs the blocks of a model that is in memory, but for one.

    The hidden states in front of the block in question are carried along, so that a trial costs
    only the blocks behind it: about n^2 / 2 block passes for all n blocks.

    Args:
        batches: of model inputs.
    """

    def __init__(
        self, model: nn.Module, anatomy: Anatomy, batches: list[dict[str, torch.Tensor]]
    ) -> None:
        first = _Memory()
        self.calls = capture_inputs(model, anatomy, batches, first)
        self.inputs = first.values
        self._blocks = [model.get_submodule(b.path) for b in anatomy.blocks]

    @torch.no_grad()
    def through(self, blocks: Sequence[int], batch: int) -> torch.Tensor:
        """Hidden states [batch, length, hidden size] of a batch that leave the last of some blocks,
        run one after the other."""
        return self._run(blocks, batch, self.inputs[batch])

    @torch.no_grad()
    def without_each(
        self, blocks: Sequence[int], candidates: Collection[int], batch: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Each candidate among the ``blocks``, and :meth:`through` the others."""
        prefix = self.inputs[batch]
        for position, index in enumerate(blocks):
            if index in candidates:
                yield index, self._run(blocks[position + 1 :], batch, prefix)
            prefix = self._run([index], batch, prefix)

    def _run(self, blocks: Sequence[int], batch: int, hidden: torch.Tensor) -> torch.Tensor:
        for index in blocks:
            hidden = self.calls[index][batch](self._blocks[index], hidden)
        return hidden
