"""How much each expert of a mixture contributes to what its block computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from compress.models.experts import DOWN
from compress.models.mixtures import Mixture, expert_count


class Contributions:
    """How much each expert of a block adds to what the block computes, over many tokens.

    Attributes:
        tokens: that each expert was sent, [experts].
        weighted: sum over them of routing weight x Euclidean norm of the expert's output, float64,
            [experts].
    """

    def __init__(self, block: nn.Module, mixture: Mixture) -> None:
        self._experts = block.get_submodule(mixture.experts)
        count = expert_count(self._experts)
        self.tokens = torch.zeros(count, dtype=torch.int64)
        self.weighted = torch.zeros(count, dtype=torch.float64)
        self._index, self._weights = torch.empty(0), torch.empty(0)
        self._real: torch.Tensor | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count what passes through the block meanwhile."""
        hooks: list[Any] = [self._experts.register_forward_pre_hook(self._routed)]
        for number in range(len(self.tokens)):
            down = self._experts.get_submodule(f"{number}.{DOWN}")
            hooks.append(
                down.register_forward_hook(
                    lambda _module, _args, output, number=number: self._passed(number, output)
                )
            )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def leave_out(self, real: torch.Tensor | None) -> None:
        """Of the next pass, count only tokens that are no padding.

        Args:
            real: bool [batch, length]; None where nothing is padding.
        """
        self._real = None if real is None else real.reshape(-1)

    def _routed(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        _states, self._index, self._weights = args

    def _passed(self, number: int, output: torch.Tensor) -> None:
        token, place = torch.where(self._index == number)
        weights = self._weights[token, place].double()
        if self._real is not None and len(self._real) == len(self._index):
            keep = self._real.to(token.device)[token]
            weights, output = weights[keep], output[keep]
        self.tokens[number] += len(weights)
        self.weighted[number] += float((weights * output.double().norm(dim=-1)).sum())
