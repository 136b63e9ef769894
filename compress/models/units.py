"""Narrowing linears and layers, and which rows and columns a unit of a block owns.

A *unit* is what a width step removes as a whole: a neuron of the FFN, or a key/value head together
with the query heads that read it.
"""

from __future__ import annotations

import torch
from torch import nn

from compress.linear.layer import reading, writing
from compress.linear.matrix import matrix, slice_linear
from compress.models.anatomy import ATTENTION_OUT, DOWN, QKV, UP, BlockAnatomy
from compress.models.families import CONCATENATED, INTERLEAVED, SEPARATE
from compress.models.widths import set_width_attributes


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


def units_of_rows(anatomy: BlockAnatomy, kind: str) -> dict[str, torch.Tensor]:
    """To which unit each output row of the producers (query, key, value; gate, up) belongs.

    Args:
        kind: site of the output projection that the units feed, ``attention_out`` or ``down``.

    Returns:
        Path in the block -> unit index of each row.
    """
    if kind == DOWN:
        neurons = torch.arange(anatomy.ffn)
        fused = anatomy.family.up_layout == CONCATENATED
        rows = torch.cat([neurons, neurons]) if fused else neurons
        return dict.fromkeys(anatomy.site(UP).linears, rows)
    names, layout = anatomy.site(QKV).linears, anatomy.family.qkv_layout
    groups = torch.arange(anatomy.kv_heads)
    key = groups.repeat_interleave(anatomy.head_dim)
    query = groups.repeat_interleave(anatomy.heads // anatomy.kv_heads * anatomy.head_dim)
    if layout == SEPARATE:
        return {name: query if i == 0 else key for i, name in enumerate(names)}
    if layout == INTERLEAVED:
        # [head, (q, k, v), head_dim]; such families have a key/value head for each query head.
        return {names[0]: groups.repeat_interleave(3 * anatomy.head_dim)}
    return {names[0]: torch.cat([query, key, key])}


def keep_units(
    block: nn.Module,
    anatomy: BlockAnatomy,
    kind: str,
    kept: torch.Tensor,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Keep only some units of a live block.

    Args:
        anatomy: of the block before that.
        kind: site of the output projection that the units feed, ``attention_out`` or ``down``.
        kept: int64 indices of the units that stay, ascending.
        weight: the matrix [out, columns that stay] of the output projection; default: its own.

    Returns:
        Indices of the output projection's columns that stay.
    """
    kept = kept.cpu()
    columns = unit_columns(anatomy, kind)[kept].reshape(-1)
    narrow_columns(block.get_submodule(anatomy.site(kind).linears[0]), columns, weight)
    for name, owners in units_of_rows(anatomy, kind).items():
        narrow_rows(block.get_submodule(name), torch.isin(owners, kept).nonzero().flatten())
    widths = {**anatomy.widths, "ffn": len(kept)}
    if kind == ATTENTION_OUT:
        heads = anatomy.heads // anatomy.kv_heads * len(kept)
        widths = {**anatomy.widths, "heads": heads, "kv_heads": len(kept)}
    set_width_attributes(block, anatomy, widths)
    return columns


def narrow_rows(module: nn.Module, rows: torch.Tensor) -> None:
    """Keep only some outputs of a linear or a layer."""
    slice_linear(writing(module), rows=rows.to(writing(module).weight.device))


def narrow_columns(
    module: nn.Module, columns: torch.Tensor, weight: torch.Tensor | None = None
) -> None:
    """Keep only some inputs of a linear or a pair.

    Args:
        columns: indices of the inputs that stay, ascending.
        weight: the matrix [out, len(columns)] that the reading linear gets; default: its own.
    """
    target = reading(module)
    slice_linear(target, columns=columns.to(target.weight.device))
    if weight is not None:
        matrix(target).copy_(weight)
