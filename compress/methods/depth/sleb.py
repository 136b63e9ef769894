"""SLEB: blocks go one at a time, always the one that the loss misses least."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from compress.errors import CompressError
from compress.methods.depth.base import DepthMethod
from compress.methods.depth.loss import LossBatch, loss_batch, tail_loss
from compress.methods.passes import KeepBlocks, Pass, Whole
from compress.models.anatomy import Anatomy
from compress.models.calls import capture_inputs
from compress.models.outline import Outline
from compress.models.replay import BlockCall


class SLEB(DepthMethod):
    """Remove, round after round, the block without which the calibration loss is lowest.

    A round tries all remaining blocks. The hidden states in front of the block in question are
    carried along, so that a trial costs only the blocks behind it: about n^2 / 2 block passes over
    the calibration set a round, for n blocks.
    """

    name: ClassVar[str] = "sleb"
    summary: ClassVar[str] = "remove blocks one at a time by the loss of the model without them"
    source: ClassVar[str] = "Song et al. 2024, arXiv 2402.09025, Algorithm 1"

    seed: int = Field(
        0, description="Of the tokens to predict, for masked models whose batches have no labels."
    )

    def check(self, anatomy: Anatomy, outline: Outline) -> None:
        super().check(anatomy, outline)
        if not outline.predicts:
            raise CompressError(
                "a model with a head, whose loss tells what a block is worth",
                f"a {anatomy.model_type} without the head of a language model or of labels",
                "Use shortgpt, which looks at hidden states only",
            )

    def passes(self) -> tuple[Pass, ...]:
        whole = Whole(self.search, forwards=self._forwards, heads=self._heads)
        return whole, KeepBlocks(self.kept_blocks)

    def _forwards(self, outline: Outline) -> float:
        blocks = len(outline.blocks)
        rounds = range(self.count(blocks))
        # Prefix and trials of a round with n blocks: n + n (n - 1) / 2 block passes.
        return sum((blocks - r) * (blocks - r + 1) / 2 / blocks for r in rounds)

    def _heads(self, outline: Outline) -> float:
        blocks = len(outline.blocks)
        return float(sum(blocks - r for r in range(self.count(blocks))))

    def search(
        self, model: nn.Module, anatomy: Anatomy, batches: list[dict[str, torch.Tensor]]
    ) -> dict[str, Any]:
        """Return the removed blocks, the order in which they went, and the loss after each."""
        generator = torch.Generator().manual_seed(self.seed)
        prepared = [loss_batch(model, batch, generator) for batch in batches]
        first = _Memory()
        calls = capture_inputs(model, anatomy, [b.inputs for b in prepared], first)
        search = _Search(model, anatomy, prepared, first.values, calls)
        order, losses = [], []
        kept = list(range(len(anatomy.blocks)))
        candidates = set(self.candidates(len(kept), anatomy.family))
        for _ in range(self.count(len(kept))):
            without = search.losses_without(kept, candidates - set(order))
            # Of equals the later block goes: its error has fewer blocks left to grow in.
            worst = min(without, key=lambda i: (without[i], -i))
            order.append(worst)
            losses.append(without[worst])
            kept.remove(worst)
        return {"removed": sorted(order), "order": order, "losses": losses}


class _Memory:
    """Takes what ``capture_inputs`` would write to a file."""

    def __init__(self) -> None:
        self.values: list[torch.Tensor] = []

    def write(self, _index: int, value: torch.Tensor) -> None:
        self.values.append(value.detach().clone())


class _Search:
    """Losses of a model without one more of its blocks."""

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        batches: list[LossBatch],
        hidden: list[torch.Tensor],
        calls: list[list[BlockCall]],
    ) -> None:
        self.model, self.anatomy, self.batches = model, anatomy, batches
        self.hidden, self.calls = hidden, calls
        self.blocks = [model.get_submodule(b.path) for b in anatomy.blocks]

    @torch.no_grad()
    def losses_without(self, kept: list[int], candidates: set[int]) -> dict[int, float]:
        """Mean loss of the model of the ``kept`` blocks without each of the candidates."""
        totals = dict.fromkeys(sorted(candidates), 0.0)
        count = 0
        for number, batch in enumerate(self.batches):
            prefix = self.hidden[number]
            for position, index in enumerate(kept):
                if index in totals:
                    hidden = prefix
                    for later in kept[position + 1 :]:
                        hidden = self._run(later, number, hidden)
                    loss, tokens = tail_loss(self.model, self.anatomy, batch, hidden)
                    totals[index] += loss
                prefix = self._run(index, number, prefix)
            count += tokens
        if not count:
            raise CompressError(
                "calibration batches with tokens to predict",
                "none (all padding, or no token was masked)",
                "Give more or longer calibration samples",
            )
        means = {i: total / count for i, total in totals.items()}
        # A block whose absence breaks the model is not the one to remove.
        return {i: m if math.isfinite(m) else math.inf for i, m in means.items()}

    def _run(self, block: int, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        return self.calls[block][batch](self.blocks[block], hidden)
