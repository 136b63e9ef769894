"""A linear map as a small dense dictionary times a sparse matrix of coefficients."""

from __future__ import annotations

from contextlib import nullcontext
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes

from compress.linear.casting import is_mixed, unmixed
from compress.linear.layer import Layer, LayerSize, LayerSpec, LinearShape
from compress.linear.matrix import matrix
from compress.linear.routes import fastest, watched
from compress.linear.seen import Seen

# Tokens from which on the product with one dense matrix is the faster one wherever we measured.
_FEW = 32


class DenseSparse(LayerSpec):
    """A linear is a :class:`DenseSparseLinear` of this form."""

    kind: Literal["dense_sparse"] = "dense_sparse"
    blocks: int = Field(ge=1)
    rank: int = Field(ge=1, le=2**16)
    nonzeros: int = Field(ge=1)


class DenseSparseLinear(Layer):
    """y = S^T D^T x: inputs are cut into blocks, each block has a dictionary of ``rank`` atoms, and
    every output is a sum of exactly ``nonzeros`` of them a block.

    With B blocks of b = in / B inputs, W^T = D S; D is block-diagonal, [in, B r], and each column
    of S [B r, out] has k non-zeros a block.

    Attributes:
        dictionary: holds D as [B r, b], an atom a row. A container: nothing is passed through it.
        values: holds the non-zeros of S as [out, B k], an output a row; likewise.
        indices: [out, B k], uint8 where the rank is at most 256, else uint16: the atom of each
            value, within its block, ascending there.
        serving: the weights are final, so that the layer may keep the dense matrix beside them
            (``4 out in`` bytes in float32) once a product with it has turned out to be the faster
            way. Models that are loaded serve, but not while a step works on them: its memory is
            planned, and its results must not depend on what a machine is fast at.
    """

    kind: ClassVar[str] = "dense_sparse"
    Spec: ClassVar[type[LayerSpec]] = DenseSparse

    def __init__(
        self,
        in_features: int,
        out_features: int,
        blocks: int,
        rank: int,
        nonzeros: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if in_features % blocks or nonzeros > rank:
            raise ValueError("blocks divide the inputs, and nonzeros are at most rank")
        self.in_features, self.out_features = in_features, out_features
        self.blocks, self.rank, self.nonzeros = blocks, rank, nonzeros
        made = {"bias": False, "device": device, "dtype": dtype}
        self.dictionary = nn.Linear(in_features // blocks, blocks * rank, **made)
        self.values = nn.Linear(blocks * nonzeros, out_features, **made)
        first = torch.arange(nonzeros, device=device).to(index_dtype(rank))
        self.register_buffer("indices", first.repeat(out_features, blocks))
        zeros = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.bias = None if zeros is None else nn.Parameter(zeros)
        self._kept: tuple[list[Seen], torch.Tensor] | None = None

    indices: torch.Tensor

    def spec(self) -> DenseSparse:
        return DenseSparse(blocks=self.blocks, rank=self.rank, nonzeros=self.nonzeros)

    @classmethod
    def build(cls, spec: DenseSparse, like: LinearShape) -> DenseSparseLinear:
        return cls(
            like.in_features, like.out_features, spec.blocks, spec.rank, spec.nonzeros, like.bias,
            like.device, like.dtype,
        )  # fmt: skip

    def tables(self) -> tuple[str, ...]:
        return "dictionary", "values"

    def size(self) -> LayerSize:
        atoms = self.in_features * self.rank
        values = self.out_features * self.blocks * self.nonzeros
        zeros = 0
        if not self.indices.is_meta:
            zeros = sum(int((matrix(m) == 0).sum()) for m in (self.dictionary, self.values))
        extra = values * self.indices.dtype.itemsize
        return LayerSize(atoms + values, atoms + values - zeros, atoms + values, extra)

    def dense(self) -> torch.Tensor:
        tables = matrix(self.dictionary), matrix(self.values)
        with torch.no_grad(), unmixed(tables[0].device.type):
            return self._product(*tables)

    def forget(self) -> None:
        self._kept = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_kept": None}

    def train(self, mode: bool = True) -> DenseSparseLinear:
        self.forget()
        return super().train(mode)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        tables = self.dictionary.weight, self.values.weight
        if torch.is_grad_enabled() and any(t.requires_grad for t in tables):
            self.forget()  # whoever learns may write what no version tells: fused optimisers do
            return functional.linear(inputs, self._product(*tables), self.bias)
        if not self.serving or self.training:
            return functional.linear(inputs, self._made(), self.bias)
        tokens = inputs.numel() // self.in_features
        if 0 < tokens <= _FEW and self._may_gather(inputs):
            shape = (self.out_features, self.in_features, *self.indices.shape, self.rank, tokens)
            key = ("dense_sparse", *shape, inputs.dtype, inputs.device, torch.get_num_threads())
            return fastest(key, (self._gathered, self._multiplied), inputs)(inputs)
        return self._multiplied(inputs)

    def _may_gather(self, inputs: torch.Tensor) -> bool:
        """Not beside a gradient or in mixed types, and whoever counts sees the plainest way."""
        learns = torch.is_grad_enabled() and inputs.requires_grad
        return not (learns or is_mixed(inputs.device.type) or watched())

    def _multiplied(self, inputs: torch.Tensor) -> torch.Tensor:
        """By way of the dense matrix, which is made once."""
        tensors = self.dictionary.weight, self.values.weight, self.indices
        if self._kept is None or not all(map(Seen.is_still, self._kept[0], tensors)):
            self._kept = ([Seen(tensor) for tensor in tensors], self._made())
        return functional.linear(inputs, self._kept[1].to(inputs.dtype), self.bias)

    def _made(self) -> torch.Tensor:
        """W without gradients, in the type of its tables. Who counts products sees the layer's, not
        these."""
        tables = self.dictionary.weight, self.values.weight
        unseen = _disable_current_modes() if watched() else nullcontext()
        with torch.no_grad(), unseen, unmixed(tables[0].device.type):
            return self._product(*tables)

    def _gathered(self, inputs: torch.Tensor) -> torch.Tensor:
        """Products with all atoms, of which each output gathers its own: B k n + m r products."""
        blocks, width = self.blocks, self.in_features // self.blocks
        rows = inputs.reshape(-1, blocks, width).transpose(0, 1)
        atoms = self.dictionary.weight.view(blocks, self.rank, width).to(inputs.dtype)
        answers = torch.bmm(atoms, rows.transpose(1, 2)).flatten(0, 1)  # [B r, tokens]
        first = torch.arange(blocks, device=inputs.device, dtype=torch.int32) * self.rank
        places = self.indices.to(torch.int32) + first.repeat_interleave(self.nonzeros)
        found = functional.embedding_bag(
            places, answers, per_sample_weights=self.values.weight.to(inputs.dtype), mode="sum"
        )
        output = found.t().reshape(*inputs.shape[:-1], self.out_features)
        return output if self.bias is None else output + self.bias

    def _product(self, atoms: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """W [out, in]; gradients reach atoms and values."""
        blocks, rank = self.blocks, self.rank
        places = self.indices.long().view(-1, blocks, self.nonzeros)
        sparse = values.new_zeros(self.out_features, blocks, rank)
        sparse = sparse.scatter(2, places, values.view(-1, blocks, self.nonzeros))
        product = torch.bmm(sparse.transpose(0, 1), atoms.view(blocks, rank, -1))
        return product.transpose(0, 1).reshape(self.out_features, self.in_features)


def index_dtype(rank: int) -> torch.dtype:
    """The narrowest unsigned type that counts so many atoms."""
    return torch.uint8 if rank <= 2**8 else torch.uint16


def stored_bytes(
    out_features: int, in_features: int, blocks: int, rank: int, nonzeros: int, value_bytes: int
) -> int:
    """Bytes of dictionary, values and indices: w (n r + m B k) + q m B k for W [m, n]."""
    values = out_features * blocks * nonzeros
    return value_bytes * (in_features * rank + values) + index_dtype(rank).itemsize * values
