"""Embeddings and heads on a grid: the mark that says so, and lookups in packed weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from compress.linear.grid import QuantScheme, quantize
from compress.linear.packed import PackedLinear


@dataclass(frozen=True)
class Grid:
    """The grid on which the weight [rows, columns] of a module lies; its mark as ``module.grid``.

    Attributes:
        scale, zero_point: [rows, groups], as ``linear/grid.py`` has them; None where symmetric.
    """

    scheme: QuantScheme
    scale: torch.Tensor
    zero_point: torch.Tensor | None

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """The codes of a weight that lies on it."""
        return quantize(weight, self.scale, self.zero_point, self.scheme)


class PackedEmbedding(nn.Module):
    """Rows of a table whose codes stay packed; a tied head multiplies with the same table.

    Args:
        table: the weights, [out] being the tokens.
        dtype: of what is looked up.
    """

    def __init__(self, table: PackedLinear, dtype: torch.dtype, padding_idx: int | None) -> None:
        super().__init__()
        self.table, self.dtype = table, dtype
        self.num_embeddings, self.embedding_dim = table.out_features, table.in_features
        self.padding_idx = padding_idx

    @property
    def weight(self) -> torch.Tensor:
        """Of the shape that an embedding's weight would have, without values."""
        return torch.empty(self.num_embeddings, self.embedding_dim, dtype=self.dtype, device="meta")

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = self.table.rows(ids.reshape(-1)).to(self.dtype)
        return rows.view(*ids.shape, self.embedding_dim)
