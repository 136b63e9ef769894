"""Weights of a checkpoint that the model has no place for: which may be left out, which may not.

Checkpoints carry more than one model needs: another head, a pooler, buffers that classes now
compute. Weights of a part that the model *has* are another matter (a bias of its layers, a layer
more than config.json counts): without them it would be another model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel

from compress.errors import CompressError
from compress.models.anatomy import find_blocks

# Buffers that classes used to store and now compute.
_COMPUTED = r"(rotary_emb\.inv_freq|(^|\.)position_ids|(^|\.)masked_bias|attn\.bias)$"


def unused_weights(model: PreTrainedModel, names: Iterable[str]) -> tuple[str, ...]:
    """Return those of the left-over names that a report should mention.

    Args:
        names: stored tensors that are no parameter or buffer of the model.

    Raises:
        CompressError: a tensor belongs to a part that the model has.
    """
    known = [_COMPUTED, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    known = re.compile("|".join(f"({pattern})" for pattern in known))
    names = [name for name in names if not known.search(name)]
    blocks = find_blocks(model)[0] + "."
    base = getattr(model, "base_model_prefix", "") + "."
    owned = [
        name
        for name in names
        if name.startswith(blocks) or (base + name).startswith(blocks) or _has_owner(model, name)
    ]
    if owned:
        raise CompressError(
            "a place in the model that config.json describes for every weight of its layers",
            f"none for {len(owned)} of them, {owned[0]} first",
            "The config and the weights belong to different models: fetch both again",
        )
    return tuple(names)


def _has_owner(model: nn.Module, name: str) -> bool:
    """Whether a tensor would be a parameter of a module that has others."""
    try:
        owner = model.get_submodule(name.rpartition(".")[0])
    except AttributeError:
        return False
    return owner is not model and next(owner.parameters(recurse=False), None) is not None
