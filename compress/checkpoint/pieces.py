"""Experts' matrices in a checkpoint: slices of one tensor, or tensors that the class puts together.

transformers' files hold each expert by itself (Mixtral's ``experts.3.w1.weight``), and its classes
all of them in one parameter; files of other tools, and ours, hold that parameter. Either way a
matrix of one expert is read without the others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compress.errors import CompressError
from compress.models.experts import UnfusedExperts, tensors_of
from compress.system.tensors import TensorIndex

# What transformers does to experts of a file: all of a layer in one tensor, gate above up.
_MERGING = {"MergeModulelist", "Concatenate"}
_NUMBER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Piece:
    """A matrix or a bias of one expert.

    Attributes:
        names: of stored tensors, one above the other.
        number: of the expert, where a stored tensor holds all of them.
        transposed: whether that tensor holds matrices [in, out].
    """

    names: tuple[str, ...]
    number: int | None = None
    transposed: bool = False

    def get(self, index: TensorIndex, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The values [out, in], or [out]."""
        if self.number is None:
            found = torch.cat([index.get(name) for name in self.names])
        else:
            found = index.get_slice(self.names[0], self.number)
            found = found.t().contiguous() if self.transposed else found
        return found if dtype is None else found.to(dtype)

    def dtype(self, index: TensorIndex) -> torch.dtype:
        return index.dtype(self.names[0])

    def nbytes(self, index: TensorIndex) -> int:
        whole = sum(index.nbytes(name) for name in self.names)
        return whole if self.number is None else whole // index.shape(self.names[0])[0]

    def shape(self, index: TensorIndex) -> tuple[int, ...]:
        shapes = [index.shape(name) for name in self.names]
        if self.number is None:
            return (sum(shape[0] for shape in shapes), *shapes[0][1:])
        return shapes[0][:0:-1] if self.transposed else shapes[0][1:]


def expert_pieces(
    index: TensorIndex,
    model: nn.Module,
    rename: Callable[[str], str],
    conversions: Sequence[Any],
) -> tuple[dict[str, Piece], frozenset[str]]:
    """Pieces by the names that the linears of a model's experts have, and what they are made of.

    Args:
        model: whose experts have been taken apart.
        rename: what transformers calls a stored tensor.
        conversions: what transformers makes others of.
    """
    experts = {n: m for n, m in model.named_modules() if isinstance(m, UnfusedExperts)}
    if not experts:
        return {}, frozenset()
    held = {f"{path}.{name}{end}": (path, name, end) for path, module in experts.items()
            for name in tensors_of(module) for end in ("", "_bias")}  # fmt: skip
    base = model.base_model_prefix + "."
    pieces: dict[str, Piece] = {}
    parts: dict[str, dict[int, str]] = {}
    used: set[str] = set()
    for stored in index.names():
        name = rename(stored)
        whole = held.get(name) or held.get(base + name)
        if whole is not None:
            path, tensor, end = whole
            kind = "bias" if end else "weight"
            for number in range(index.shape(stored)[0] if index.shape(stored) else 0):
                transposed = not end and experts[path].is_transposed
                pieces[f"{path}.{number}.{tensor}.{kind}"] = Piece((stored,), number, transposed)
            used.add(stored)
            continue
        target, place, number = _merged(name, conversions)
        merged = held.get(target) or held.get(base + target)
        if merged is not None and not experts[merged[0]].is_transposed:
            path, tensor, _ = merged
            parts.setdefault(f"{path}.{number}.{tensor}.weight", {})[place] = stored
            used.add(stored)
    pieces |= {name: Piece(tuple(found[i] for i in sorted(found))) for name, found in parts.items()}
    return pieces, frozenset(used)


def check_pieces(index: TensorIndex, pieces: dict[str, Piece], model: nn.Module) -> None:
    """Compare the shapes of pieces with what the config promises.

    Raises:
        CompressError: naming the first that differs.
    """
    promised = model.state_dict()
    for name, piece in pieces.items():
        wanted = tuple(promised[name].shape) if name in promised else None
        if wanted is not None and piece.shape(index) != wanted:
            raise CompressError(
                f"{piece.names[0]} to hold {name} of shape {list(wanted)}, as config.json promises",
                f"{list(piece.shape(index))}",
                "The config and the weights belong to different models",
            )


def _merged(name: str, conversions: Sequence[Any]) -> tuple[str, int, int]:
    """The parameter that a stored tensor becomes part of, its place there, and its expert."""
    for conversion in conversions:
        kinds = {type(step).__name__ for step in conversion.operations}
        if not kinds <= _MERGING:
            continue
        target, pattern = conversion.rename_source_key(name)
        numbers = _NUMBER.findall(name)
        if pattern is not None and numbers:
            return target, conversion.source_patterns.index(pattern), int(numbers[-1])
    return "", 0, 0
