"""Blocks of other widths than the config's: which sizes follow, and making a block have them."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from compress.linear.layer import reading, writing
from compress.models.anatomy import (
    ATTENTION_OUT,
    DOWN,
    QKV,
    UP,
    BlockAnatomy,
)
from compress.models.families import CONCATENATED, SEPARATE
from compress.models.mixtures import keep_experts


def linear_sizes(anatomy: BlockAnatomy, widths: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Return path -> (rows, columns) that the widths ask for; 0 stands for a size left alone."""
    family = anatomy.family
    heads = widths["heads"] * anatomy.head_dim
    kv_heads = widths["kv_heads"] * anatomy.head_dim
    sizes: dict[str, tuple[int, int]] = {}
    for site in anatomy.sites:
        for position, name in enumerate(site.linears):
            if site.kind == QKV and family.qkv_layout == SEPARATE:
                sizes[name] = (heads if position == 0 else kv_heads, 0)
            elif site.kind == QKV:
                sizes[name] = (heads + 2 * kv_heads, 0)
            elif site.kind == ATTENTION_OUT:
                sizes[name] = (0, heads)
            elif site.kind == UP:
                fused = 2 if family.up_layout == CONCATENATED else 1
                sizes[name] = (fused * widths["ffn"], 0)
            elif site.kind == DOWN:
                sizes[name] = (0, widths["ffn"])
    return sizes


def resize_block(block: nn.Module, anatomy: BlockAnatomy, widths: Mapping[str, int]) -> None:
    """Give a block whose values do not matter yet (meta, or before loading) the given widths.

    Args:
        anatomy: of the block as it is.
        widths: {"heads", "kv_heads", "ffn"}, and {"experts"} of a mixture; 0 where the block has no
            such part.
    """
    experts = widths.get("experts", anatomy.experts)
    if anatomy.mixture is not None and experts < anatomy.experts:
        keep_experts(block, anatomy.mixture, range(experts))
    before = linear_sizes(anatomy, anatomy.widths)
    for name, sizes in linear_sizes(anatomy, widths).items():
        if sizes == before[name]:
            continue  # whatever it is in truth (shared key/value heads, rounded sizes)
        module, (rows, columns) = block.get_submodule(name), sizes
        _resize_linear(writing(module), rows, 0)
        _resize_linear(reading(module), 0, columns)
    set_width_attributes(block, anatomy, widths)


def _resize_linear(module: nn.Module, rows: int, columns: int) -> None:
    """Replace the weight and bias by empty ones of rows x columns (0: as it is)."""
    transposed = isinstance(module, Conv1D)
    old_rows, old_columns = module.weight.shape[::-1] if transposed else module.weight.shape
    rows, columns = rows or old_rows, columns or old_columns
    if (rows, columns) == (old_rows, old_columns):
        return
    shape = (columns, rows) if transposed else (rows, columns)
    module.weight = _empty(module.weight, shape)
    if module.bias is not None:
        module.bias = _empty(module.bias, (rows,))
    if transposed:
        module.nf, module.nx = rows, columns
    else:
        module.out_features, module.in_features = rows, columns


def _empty(like: nn.Parameter, shape: tuple[int, ...]) -> nn.Parameter:
    # Filled with zeros rather than left empty: what from_pretrained initialises afterwards, and
    # what it never fills, should be the same in every run.
    return nn.Parameter(torch.zeros(shape, dtype=like.dtype, device=like.device))


def set_width_attributes(
    block: nn.Module, anatomy: BlockAnatomy, widths: Mapping[str, int]
) -> None:
    """Make the sizes that a block's ``forward`` reads follow its widths.

    An attribute is set only where the module has it and its width changes. Call it after a live
    block was sliced. A name ``config.X`` in the family's table gives the module a config of its own
    in which X is set (for classes whose forward reads the config).

    Args:
        anatomy: of the block before it was sliced.
    """
    values = {key: widths[key] for key in widths if widths[key] != anatomy.widths[key]}
    if "heads" in values:
        values["attention_width"] = widths["heads"] * anatomy.head_dim
    for path, attributes in anatomy.family.attributes.items():
        try:
            module = block.get_submodule(path)
        except AttributeError:
            continue
        for name, expression in attributes.items():
            if expression not in values:
                continue
            if name.startswith("config."):
                module.config = copy.copy(module.config)
                module.config.per_layer_config = None
                setattr(module.config, name.removeprefix("config."), values[expression])
            elif hasattr(module, name):
                setattr(module, name, values[expression])
        if hasattr(module, "num_key_value_groups") and values.keys() & {"heads", "kv_heads"}:
            module.num_key_value_groups = widths["heads"] // widths["kv_heads"]
