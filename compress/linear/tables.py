"""Embeddings and heads on a grid: the mark that says so, and lookups in packed weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from compress.errors import CompressError
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


def embedding_scale(module: nn.Embedding) -> float:
    """What an embedding multiplies the rows with that it looks up: 1 for a plain one.

    Classes of transformers called ``…ScaledWordEmbedding`` keep it as a number, or as a buffer that
    no checkpoint has with the number beside it.

    Raises:
        CompressError: its class computes something else of the rows.
    """
    if type(module).forward is nn.Embedding.forward:
        return 1.0
    scale = getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", None))
    named = type(module).__name__.endswith("ScaledWordEmbedding")
    # Who holds more than the table adds to what is looked up (T5Gemma 2 has a vector for an image's
    # end), or normalises it.
    alone = [name for name, _ in module.named_parameters()] == ["weight"]
    if not named or not alone or not isinstance(scale, (int, float)):
        raise CompressError(
            "an embedding that looks rows up, or one that scales them by a number",
            f"a {type(module).__name__}",
            "Leave `embeddings` out of the step: this class computes something else of the rows",
        )
    return float(scale)


class PackedEmbedding(nn.Module):
    """Rows of a table whose codes stay packed; a tied head multiplies with the same table.

    Args:
        table: the weights, [out] being the tokens.
        like: the embedding in whose place it is put.
        dtype: of what is looked up.

    Raises:
        CompressError: the class of ``like`` is none that :func:`embedding_scale` knows.
    """

    def __init__(self, table: PackedLinear, like: nn.Embedding, dtype: torch.dtype) -> None:
        super().__init__()
        self.table, self.dtype = table, dtype
        self.num_embeddings, self.embedding_dim = table.out_features, table.in_features
        self.padding_idx = like.padding_idx
        self.embed_scale = embedding_scale(like)
        if hasattr(like, "scalar_embed_scale"):  # a buffer, which is rounded before it multiplies
            self.embed_scale = torch.tensor(self.embed_scale, dtype=dtype, device="cpu").item()

    @property
    def weight(self) -> torch.Tensor:
        """Of the shape that an embedding's weight would have, without values."""
        return torch.empty(self.num_embeddings, self.embedding_dim, dtype=self.dtype, device="meta")

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = self.table.rows(ids.reshape(-1)).to(self.dtype)
        if self.embed_scale != 1:
            rows = rows * self.embed_scale
        return rows.view(*ids.shape, self.embedding_dim)
