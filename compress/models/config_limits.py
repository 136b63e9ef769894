"""The numbers of a config.json, looked at before a class is built from them.

transformers checks types. What it builds from values that no model can have is an endless loop (a
billion layers), a division by zero, or a model whose every output is NaN.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from compress.errors import CompressError

# Names that transformers gives the same thing in every model; attribute_map has a model's own.
_AT_LEAST_ONE = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim",
)  # fmt: skip
_LAYERS = re.compile(r"(layers?|blocks|depths?)$")
_EPSILON = re.compile(r"eps(ilon)?$")
_MOST_POSITIONS = 10**8  # ten times what any model has; some classes build a table of them
# So many layers are built in seconds, and configs of small models name numbers of layers that they
# do not have (a default of max_window_layers).
_ALWAYS_BUILT = 1000

_FIX = "Correct the field, or fetch config.json again"


def check_one_stack(config: PreTrainedConfig, name: str) -> None:
    """Refuse encoders with decoders: blocks are walked as one list that hands one residual stream
    on, and what a decoder's block reads of the encoder has no place in that.

    Args:
        name: of the class.

    Raises:
        CompressError: always the same sentence.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise CompressError(
            "a model of one stack of blocks", f"{name}, an encoder with a decoder",
            "Only encoders and decoders by themselves are supported",
        )  # fmt: skip


def check_numbers(fields: dict[str, Any], where: str) -> None:
    """Refuse numbers in the fields of a config.json that no model can have.

    Args:
        fields: the parsed file.
        where: its path, for the error.

    Raises:
        CompressError: naming the first such field.
    """
    own = getattr(CONFIG_MAPPING.get(fields.get("model_type"), None), "attribute_map", None) or {}
    counted = {own.get(name, name) for name in _AT_LEAST_ONE} | set(_AT_LEAST_ONE)
    for path, value in _numbers(fields):
        name = path.rpartition(".")[2]
        wanted = _wanted(name, value, name in counted)
        if wanted:
            raise CompressError(f"{path} to be {wanted}", f"{value!r:.60}", _FIX, where=where)


def _wanted(name: str, value: int | float, counted: bool) -> str:
    """What a number had to be, or "" where it may be what it is."""
    if math.isnan(value):
        return "a number"
    if counted and value < 1:
        return "at least 1"
    if _EPSILON.search(name) and not 0 <= value < 1:
        return "a small number from 0 (it keeps a division from being one by zero)"
    if name == "rope_theta" and not 0 < value < math.inf:
        return "a positive number"
    if name == "max_position_embeddings" and not 1 <= value <= _MOST_POSITIONS:
        return f"from 1 to {_MOST_POSITIONS:,}"
    return ""


def check_layers(config: PreTrainedConfig, tensors: int) -> None:
    """Refuse a config that promises more layers than the checkpoint has tensors.

    Args:
        config: as loaded.
        tensors: how many the headers of the checkpoint list; 0 where there is no checkpoint.

    Raises:
        CompressError: naming the field.
    """
    limit = max(_ALWAYS_BUILT, tensors)
    for path, value in _numbers(config.to_dict()):
        name = re.sub(r"\.\d+$", "", path)
        if _LAYERS.search(name) and value > limit:
            if not tensors:
                raise CompressError(f"{path} of at most {limit}", f"{value:,}", "Lower it")
            raise CompressError(
                f"{path} of config.json to fit the weights ({tensors} tensors)", f"{value:,}",
                "The config and the weights belong to different models, or the field is wrong",
            )  # fmt: skip


def _numbers(value: Any, path: str = "") -> Iterator[tuple[str, int | float]]:
    """(path, number) of every number in plain data; truth values are none."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _numbers(item, f"{path}.{number}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value
