"""The stock config that one of ours extends, and what its fields say of widths."""

from __future__ import annotations

import copy

import torch
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from compress.models.anatomy import stock_type
from compress.models.families import Family
from compress.models.loading import auto_class

SECTION_VERSION = 1  # of the section `compress`
_NOT_IN_RECORDS = ("head_dim", "embeddings")
PREFIX = "compress_"  # of model types
OWN = "Compress"  # of class names
_OWN_KEYS = ("compressed_modules", "compress", "quantization_config", "per_layer_config")


def stock_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a copy without anything of ours: stock class, global widths, no quantisation."""
    new = copy.deepcopy(config)
    new.per_layer_config = None
    for key in _OWN_KEYS:
        new.__dict__.pop(key, None)
    if not config.model_type.startswith(PREFIX):
        return new
    stock = as_class(CONFIG_MAPPING[stock_type(config)], new)
    stock.architectures = [_strip(name) for name in config.architectures or []]
    stock._attn_implementation = config._attn_implementation
    return stock


def stock_sizes(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same, but for what no record says: the size of heads that the class would not derive, and
    the schemes of embeddings."""
    new = stock_config(config)
    kept = {
        k: v for k, v in (getattr(config, "compress", None) or {}).items() if k in _NOT_IN_RECORDS
    }
    if kept:
        new.compress = {"version": SECTION_VERSION, **kept}
    return new


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model that the class builds from a stock config, without weights."""
    # The config's own code has run if it is an object of a class from there.
    own_code = type(config).__module__.startswith("transformers_modules.")
    kind = auto_class(config) if config.architectures else AutoModel
    with torch.device("meta"):
        return kind.from_config(copy.deepcopy(config), trust_remote_code=own_code)


def as_class(config_class: type[PreTrainedConfig], config: PreTrainedConfig) -> PreTrainedConfig:
    values = config.to_dict()
    del values["model_type"]  # else it would hide the class's own
    return config_class.from_dict(values)


def _strip(architecture: str) -> str:
    return architecture.removeprefix(OWN)


def own_head_dim(config: PreTrainedConfig) -> int:
    """The size of a head that the stock class would not give it: where the class derives it from
    the width of the stream, and the stream is narrower than the heads together. Else 0."""
    return (getattr(config, "compress", None) or {}).get("head_dim", 0)


def homogeneous(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config of a layer without overrides (a shallow copy where there are any)."""
    if not config.is_heterogeneous:
        return config
    plain = copy.copy(config)
    plain.per_layer_config = None
    return plain


def global_widths(config: PreTrainedConfig, family: Family) -> dict[str, int]:
    """Return the widths that fields give to a layer without overrides (0: no such field)."""
    plain = homogeneous(config)
    heads = getattr(plain, family.heads, 0)
    kv_heads = getattr(plain, family.kv_heads) if family.kv_heads else heads
    ffn = getattr(plain, family.ffn, 0)
    if ffn is None:  # GPT-2's n_inner
        ffn = 4 * plain.hidden_size
    widths = {"heads": heads, "kv_heads": kv_heads or heads, "ffn": ffn}
    experts = getattr(plain, family.experts, 0) if family.experts else 0
    return {**widths, "experts": experts} if experts else widths


def layer_widths(
    config: PreTrainedConfig, family: Family, index: int, built: dict[str, int]
) -> dict[str, int]:
    """Return {"heads", "kv_heads", "ffn"} of one layer, overrides included.

    Args:
        built: the widths that the class gives the layer without overrides.
    """
    if not config.is_heterogeneous:
        return built
    base = global_widths(config, family)
    layer = global_widths(config.per_layer_config[index], family)
    if family.kv_heads is not None and base["kv_heads"]:
        layer["heads"] = layer["kv_heads"] * base["heads"] // base["kv_heads"]
    differing = {key for key in layer if layer[key] != base[key]}
    return {key: layer[key] if key in differing else built[key] for key in built}
