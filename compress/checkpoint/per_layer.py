"""Blocks whose widths differ by layer, through transformers' own table of class patches."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig
from transformers.monkey_patching import get_patch_mapping, register_patch_mapping

from compress.checkpoint.config import homogeneous, layer_widths, stock_config
from compress.errors import CompressError
from compress.models.anatomy import block_anatomy, family_of, find_blocks, stock_type
from compress.models.families import Family
from compress.models.widths import resize_block

_registered: set[str] = set()


def register_block_class(config: PreTrainedConfig) -> None:
    """Make transformers build this config's blocks by their layer's widths. Idempotent.

    Raises:
        CompressError: another library has a patch for the same block class.
    """
    model_type = stock_type(config)
    if model_type in _registered or _upstream_builds(config):
        return
    stock = _block_class(config)
    # transformers takes names for expressions and searches: BertLayer is in MegatronBertLayer too.
    name = f"^{stock.__name__}$"
    mapping = get_patch_mapping()
    other = mapping.get(name) or mapping.get(stock.__name__)
    if other is not None:
        raise CompressError(
            f"{stock.__name__} as transformers defines it",
            f"{other.__module__}.{other.__qualname__}, registered in its place",
            "Load the compressed model in a process without that patch",
        )
    register_patch_mapping({name: _per_layer_class(stock, family_of(config))})
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
    probe = stock_config(config)
    layers_field = family_of(config).layers
    count = getattr(probe, layers_field)
    for key, value in list(vars(probe).items()):
        if "layer" in key and isinstance(value, (list, tuple)) and len(value) == count:
            setattr(probe, key, list(value[:4]))
    setattr(probe, layers_field, min(count, 4))
    probe._attn_implementation = "eager"
    with torch.device("meta"):
        return type(find_blocks(AutoModel.from_config(probe))[1][0])


class _Transparent(type(nn.Module)):
    """Instances of the stock class count as instances of its stand-in: transformers looks for
    blocks by class when it records hidden states."""

    stock: type[nn.Module]

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, cls.stock)


def _per_layer_class(stock: type[nn.Module], family: Family) -> type[nn.Module]:
    """Return a stand-in for a block class; what it makes are blocks of the stock class itself."""
    built: dict[int, int] = {}  # id of a config -> blocks made from it, where blocks have no number

    def build(cls: type, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> nn.Module:
        if cls.__dict__.get("stock") is not stock:
            return object.__new__(cls)  # somebody's subclass, made while the patch was active
        if not config.is_heterogeneous or getattr(config, "compress", None) is None:
            return stock(config, *args, **kwargs)
        if numbered:
            index = kwargs["layer_idx"] if "layer_idx" in kwargs else args[0]
        else:
            # Models make their blocks in order, all of them; a count out of step would show as
            # tensors of the wrong shape.
            index = built.get(id(config), 0) % getattr(config, family.layers)
            built[id(config)] = index + 1
        return _build_block(stock, family, index, config, args, kwargs)

    numbered = "layer_idx" in inspect.signature(stock.__init__).parameters
    return _Transparent(
        stock.__name__,
        (stock,),
        {
            "__new__": build,
            "__module__": stock.__module__,
            "__qualname__": stock.__qualname__,
            "stock": stock,
        },
    )


def _build_block(
    stock: type[nn.Module],
    family: Family,
    index: int,
    config: PreTrainedConfig,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> nn.Module:
    """Build a block by the widths that all layers have, then give it those of its own."""
    plain = homogeneous(config)
    block = stock(plain, *args, **kwargs)
    anatomy = block_anatomy(block, str(index), index, plain, family)
    resize_block(block, anatomy, layer_widths(config, family, index, anatomy.widths))
    for module in block.modules():
        # A later change of the model's attention implementation must reach its blocks.
        if getattr(module, "config", None) is plain:
            module.config = config
    return block
