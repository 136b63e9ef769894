"""Which norm a linear reads, seen in a forward pass on shapes (:mod:`compress.models.dry_run`).

What counts is whether the very tensor that a norm returns is the one that enters the linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from compress.linear.layer import is_map
from compress.models.dry_run import once_a_class, run_on_shapes


class NormFinder:
    """Finds the norms of the blocks of one model; does nothing until it is asked.

    Args:
        model: its class and config are kept, none of its weights.
        blocks: paths of its blocks, in order.
    """

    def __init__(self, model: PreTrainedModel, blocks: Sequence[str]) -> None:
        self._class, self._config, self._blocks = type(model), model.config, tuple(blocks)

    def find(self, index: int, linears: Sequence[str]) -> str | None:
        """Path inside block ``index`` of the norm that all these linears of it read.

        None where they read something else, where the norm is outside the block, and where the
        class cannot run on shapes alone.
        """
        norms = _norms_read(self._class, self._config, self._blocks)[index]
        found = {norms.get(name) for name in linears}
        return found.pop() if len(found) == 1 else None


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises: every such class of torch and transformers is named after it."""
    return "norm" in type(module).__name__.lower()


@once_a_class
def _norms_read(
    cls: type[PreTrainedModel], config: PreTrainedConfig, blocks: tuple[str, ...]
) -> list[dict[str, str]]:
    """For each block: path of a linear -> path of the norm whose output it reads."""
    watched = [_Block() for _ in blocks]
    run_on_shapes(cls, config, blocks, lambda index, block: watched[index].watch(block))
    return [seen.norms for seen in watched]


class _Block:
    """What is seen of one block: of each linear, the norm that made its input.

    A tensor is made by the innermost module that returns it first; views of it count as it, unless
    their features are others. Only what the block itself made in the same call counts, since a
    shared block is called several times.
    """

    def __init__(self) -> None:
        self.norms: dict[str, str] = {}
        self._other: set[str] = set()
        # By storage: a tensor, which keeps it alive, its version, and the norm that returned it.
        self._made: dict[int, tuple[torch.Tensor, int, str | None]] = {}

    def watch(self, block: nn.Module) -> None:
        """Register hooks; the model is thrown away afterwards."""
        block.register_forward_pre_hook(lambda _module, _args: self._made.clear())
        for name, module in block.named_modules():
            if not name:
                continue
            norm = name if is_norm(module) else None
            module.register_forward_hook(
                lambda _module, _args, output, norm=norm: self._returned(output, norm)
            )
            if is_map(module):
                module.register_forward_pre_hook(
                    lambda _module, args, name=name: self._entered(args[0], name)
                )

    def _returned(self, output: Any, norm: str | None) -> None:
        if isinstance(output, torch.Tensor):
            entry = (output, output._version, norm)
            self._made.setdefault(output.untyped_storage()._cdata, entry)

    def _entered(self, value: torch.Tensor, linear: str) -> None:
        norm = self._source(value)
        if norm is None or self.norms.get(linear, norm) != norm or linear in self._other:
            self._other.add(linear)
            self.norms.pop(linear, None)
        else:
            self.norms[linear] = norm

    def _source(self, value: torch.Tensor) -> str | None:
        found = self._made.get(value.untyped_storage()._cdata)
        if found is None:
            return None
        made, version, norm = found
        same_rows = made.numel() == value.numel() and made.shape[-1] == value.shape[-1]
        untouched = made._version == version
        return norm if same_rows and untouched and made.stride(-1) == value.stride(-1) else None
