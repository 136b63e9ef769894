"""A small model of a config's class with random weights, on which a change can be tried."""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from compress.checkpoint.fewer_layers import LEADING, NUMBERED
from compress.checkpoint.stock import stock_config
from compress.models.anatomy import family_of
from compress.models.experts import ROUTED
from compress.models.images import random_image, reads_images
from compress.models.loading import auto_class

_LENGTH = 12
# Sizes of the miniature, where the config has such a field.
_HEADS, _HEAD_DIM, _FFN, _VOCABULARY, _LAYERS, _EXPERTS = 4, 8, 32, 64, 4, 4
# Unlike the width of dense layers, also times a few shared experts: a class that reads one field
# for the other is to show.
_EXPERT_FFN = 24


def miniature(config: PreTrainedConfig) -> PreTrainedModel | None:
    """Return a small model of the config's class with random weights, None where none can be built.

    Keeps whatever is no size: activation, kinds of layers, options of the attention.
    """
    small = stock_config(config)
    family = family_of(small)
    said = {
        "num_hidden_layers": family.layers, "num_attention_heads": family.heads,
        "num_key_value_heads": family.kv_heads, "intermediate_size": family.ffn,
    }  # fmt: skip
    names = {
        **(getattr(small, "attribute_map", None) or {}),
        **{k: v for k, v in said.items() if v},
    }
    layers = getattr(small, family.layers, 0) or 0
    heads = getattr(small, family.heads, 0)
    kv_heads = getattr(small, family.kv_heads or "num_key_value_heads", None)
    groups = getattr(small, "n_group", None) or 1
    experts = max(_EXPERTS, 2 * groups)
    sizes = {
        "vocab_size": _VOCABULARY,
        "hidden_size": _HEADS * _HEAD_DIM,
        "intermediate_size": _FFN,
        "ffn_dim": _FFN,
        "moe_intermediate_size": _EXPERT_FFN,
        "shared_expert_intermediate_size": _EXPERT_FFN,
        "num_hidden_layers": min(layers, _LAYERS),
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS if kv_heads == heads else _HEADS // 2,
        "head_dim": _HEAD_DIM,
        "rotary_dim": _HEAD_DIM // 2,
        "max_position_embeddings": 64,
        family.experts or "num_experts": experts,
    }
    try:
        for key, value in list(vars(small).items()):
            if "layer" in key and isinstance(value, (list, tuple)) and len(value) == layers:
                setattr(small, key, list(value[:_LAYERS]))
            elif key in LEADING and isinstance(value, int) and value < layers:
                setattr(small, key, min(value, _LAYERS - 1))  # one behind them is left
            elif key in NUMBERED and isinstance(value, (list, tuple)):
                setattr(small, key, [i for i in value if i < _LAYERS])
            elif key in ROUTED and isinstance(value, int):
                setattr(small, key, min(value, experts // 2))
            elif key.endswith("_token_id") and isinstance(value, int):
                setattr(small, key, min(value, _VOCABULARY - 1))
        for field, value in sizes.items():
            field = names.get(field, field)
            computed = isinstance(getattr(type(small), field, None), property)
            if getattr(small, field, None) is not None and not computed:
                setattr(small, field, value)
        model = build(small)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        logits_of(model)
    except Exception:  # whatever a class objects to, it is no miniature then
        return None
    return model


def build(config: PreTrainedConfig) -> PreTrainedModel:
    """A model of the config's class with random weights, always the same, on the CPU."""
    own_code = type(config).__module__.startswith("transformers_modules.")
    state = torch.get_rng_state()
    try:
        torch.manual_seed(0)
        made = auto_class(config).from_config(
            copy.deepcopy(config), trust_remote_code=own_code, dtype=torch.float32
        )
    finally:
        torch.set_rng_state(state)
    return made.eval()


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> torch.Tensor:
    """What a model says to some tokens, or to an image."""
    if reads_images(model.config):
        return model(**random_image(model.config)).logits
    return model(input_ids=torch.arange(2, 2 + _LENGTH)[None]).logits
