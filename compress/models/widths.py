"""Narrowing linears that may be low-rank pairs, and which rows and columns a unit of a block owns.

A *unit* is what a width step removes as a whole: a neuron of the FFN, or a key/value head together
with the query heads that read it.
"""

from __future__ import annotations

import torch
from torch import nn

from compress.models.anatomy import ATTENTION_OUT, DOWN, QKV, UP, BlockAnatomy
from compress.models.families import CONCATENATED, INTERLEAVED, SEPARATE
from compress.models.linears import is_linear, matrix, slice_linear


def reading(module: nn.Module) -> nn.Module:
    """The linear that reads the input: the module itself, or the first factor of a pair."""
    return module if is_linear(module) else module.first


def writing(module: nn.Module) -> nn.Module:
    """The linear that writes the output: the module itself, or the second factor of a pair."""
    return module if is_linear(module) else module.second


def product(module: nn.Module) -> torch.Tensor:
    """The map as one matrix [out, in]; a view for a plain linear, a copy for a pair."""
    return matrix(module) if is_linear(module) else matrix(module.second) @ matrix(module.first)


def unit_columns(anatomy: BlockAnatomy, kind: str) -> torch.Tensor:
    """Columns of an output projection that each unit feeds.

    Args:
        kind: ``attention_out`` or ``down``.

    Returns:
        Indices [units, columns a unit]; together they are all columns, in order.
    """
    if kind == DOWN:
        return torch.arange(anatomy.ffn)[:, None]
    return torch.arange(anatomy.heads * anatomy.head_dim).reshape(anatomy.kv_heads, -1)


def producer_rows(
    anatomy: BlockAnatomy, kind: str, units: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Rows of the producers (query, key, value; gate, up) that belong to some units.

    Args:
        kind: site of the output projection, ``attention_out`` or ``down``.
        units: indices of units, ascending.

    Returns:
        Path in the block -> row indices, in the order in which the linear lays its rows out.
    """
    if kind == DOWN:
        return _ffn_rows(anatomy, units)
    site, layout = anatomy.site(QKV), anatomy.family.qkv_layout
    query = unit_columns(anatomy, ATTENTION_OUT)[units].reshape(-1)
    head_dim = anatomy.head_dim
    key = (units[:, None] * head_dim + torch.arange(head_dim)).reshape(-1)
    if layout == SEPARATE:
        return {n: query if i == 0 else key for i, n in enumerate(site.linears)}
    (name,) = site.linears
    if layout == INTERLEAVED:
        # [head, (q, k, v), head_dim]; such families have a key/value head for each query head.
        span = torch.arange(3 * head_dim)
        return {name: (units[:, None] * 3 * head_dim + span).reshape(-1)}
    queries, keys = anatomy.heads * head_dim, anatomy.kv_heads * head_dim
    return {name: torch.cat([query, queries + key, queries + keys + key])}


def _ffn_rows(anatomy: BlockAnatomy, units: torch.Tensor) -> dict[str, torch.Tensor]:
    fused = anatomy.family.up_layout == CONCATENATED
    rows = torch.cat([units, anatomy.ffn + units]) if fused else units
    return dict.fromkeys(anatomy.site(UP).linears, rows)


def narrow_rows(module: nn.Module, rows: torch.Tensor) -> None:
    """Keep only some outputs of a linear or a pair."""
    slice_linear(writing(module), rows=rows.to(writing(module).weight.device))
