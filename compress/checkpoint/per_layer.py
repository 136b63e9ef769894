"""Blocks whose widths differ by layer, or whose heads are not what their class would make of the
stream's width: block classes that read that from a config of ours.

transformers has a table of classes to put in the place of others (``monkey_patching``). While it
holds anything, every model that is built, of whatever type, searches all of transformers' modules
for the names, which takes a hundred times longer than building a small model. So it is the
constructor of the block class that learns about widths, and does as before for other configs.
"""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig

from compress.checkpoint.stock import homogeneous, layer_widths, own_head_dim, stock_config
from compress.models.anatomy import block_anatomy, family_of, find_blocks, stock_type
from compress.models.families import Family
from compress.models.hidden import narrow_block
from compress.models.widths import resize_block

_registered: set[str] = set()


def register_block_class(config: PreTrainedConfig) -> None:
    """Make the class of this config's blocks build them by their layer's widths. Idempotent."""
    model_type = stock_type(config)
    if model_type in _registered or (not own_head_dim(config) and _upstream_builds(config)):
        return
    _build_by_layer(_block_class(config), family_of(config))
    _registered.add(model_type)


def _upstream_builds(config: PreTrainedConfig) -> bool:
    """True where a later transformers builds the layers by itself: FFN widths, not heads, whose
    sizes its classes derive from fields that we must leave alone."""
    from transformers.integrations import heterogeneity

    fields = config.per_layer_attributes or set()
    return hasattr(heterogeneity, "apply_heterogeneous_modeling") and fields <= {
        family_of(config).ffn
    }


def _block_class(config: PreTrainedConfig) -> type[nn.Module]:
    """Find the class of a model's blocks by building its first layers on the meta device."""
    probe = _as_wide_as_heads(stock_config(config), family_of(config), own_head_dim(config))
    layers_field = family_of(config).layers
    count = getattr(probe, layers_field)
    for key, value in list(vars(probe).items()):
        if "layer" in key and isinstance(value, (list, tuple)) and len(value) == count:
            setattr(probe, key, list(value[:4]))
    setattr(probe, layers_field, min(count, 4))
    probe._attn_implementation = "eager"
    with torch.device("meta"):
        return type(find_blocks(AutoModel.from_config(probe))[1][0])


def _as_wide_as_heads(config: PreTrainedConfig, family: Family, head_dim: int) -> PreTrainedConfig:
    """A copy whose stream is as wide as its heads together, from which the class derives their
    size; the config itself where it does so anyway."""
    if not head_dim:
        return config
    wide = copy.copy(config)
    wide.hidden_size = head_dim * getattr(config, family.heads)
    return wide


def _build_by_layer(block_class: type[nn.Module], family: Family) -> None:
    """Wrap a block class's constructor; for configs without our section it does what it did."""
    stock = block_class.__init__
    numbered = "layer_idx" in inspect.signature(stock).parameters
    built: dict[int, int] = {}  # id of a config -> blocks made from it, where blocks have no number

    @functools.wraps(stock)
    def build(self: nn.Module, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        own_heads = own_head_dim(config)
        ours = getattr(config, "compress", None) is not None and (
            config.is_heterogeneous or own_heads
        )
        if not ours or type(self) is not block_class:  # what a subclass is made of, it knows
            stock(self, config, *args, **kwargs)
            return
        if numbered:
            index = kwargs["layer_idx"] if "layer_idx" in kwargs else args[0]
        else:
            # Models make their blocks in order, all of them; a count out of step would show as
            # tensors of the wrong shape.
            index = built.get(id(config), 0) % getattr(config, family.layers)
            built[id(config)] = index + 1
        plain = _as_wide_as_heads(homogeneous(config), family, own_heads)
        stock(self, plain, *args, **kwargs)
        anatomy = block_anatomy(self, str(index), index, plain, family)
        resize_block(self, anatomy, layer_widths(config, family, index, anatomy.widths))
        if own_heads:
            narrow_block(self, anatomy, torch.arange(config.hidden_size))
        for module in self.modules():
            # A later change of the model's attention implementation must reach its blocks.
            if getattr(module, "config", None) is plain:
                module.config = config

    block_class.__init__ = build
