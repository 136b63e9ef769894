"""What type each tensor of a result is stored in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

HALF = (torch.float16, torch.bfloat16)


class TypedTensors(Protocol):
    """Tensors by name, each of a type."""

    def names(self) -> Iterable[str]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    @property
    def storage_dtype(self) -> torch.dtype: ...


@dataclass(frozen=True)
class Storage:
    """The types of a result's floating tensors.

    A checkpoint in half precision may keep single tensors in float32, because its model computes
    with them in float32 (the biases that choose experts in DeepSeek-V3 and GLM-4.5, for instance,
    which bfloat16 would round by more than the scores differ). They stay what they were.

    Attributes:
        dtype: of all others.
        wide_outside: names of those outside the blocks that stay in float32.
        wide_in_blocks: names of those in blocks, relative to them: the same in all, whatever
            number a block has by now.
    """

    dtype: torch.dtype
    wide_outside: frozenset[str] = frozenset()
    wide_in_blocks: frozenset[str] = frozenset()

    @classmethod
    def like(cls, tensors: TypedTensors, blocks_path: str) -> Storage:
        """As a checkpoint stores them.

        Args:
            blocks_path: path of the list of blocks inside the model.
        """
        dtype, prefix = tensors.storage_dtype, blocks_path + "."
        if dtype not in HALF:
            return cls(dtype)
        wide = [name for name in tensors.names() if tensors.dtype(name) == torch.float32]
        inside = {n.removeprefix(prefix).partition(".")[2] for n in wide if n.startswith(prefix)}
        return cls(dtype, frozenset(n for n in wide if not n.startswith(prefix)), frozenset(inside))

    def outside(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor outside the blocks in the type that it is stored in."""
        return self._in(tensor, name in self.wide_outside)

    def in_block(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of a block, by its name there, in the type that it is stored in."""
        return self._in(tensor, name in self.wide_in_blocks)

    def _in(self, tensor: torch.Tensor, wide: bool) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        return tensor.to(torch.float32 if wide else self.dtype)


FLOAT32 = Storage(torch.float32)
