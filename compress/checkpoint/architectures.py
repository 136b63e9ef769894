"""Model types of our own: a stock architecture with some linears replaced by new modules.

``compress_llama`` is llama plus a table ``compressed_modules`` in config.json. Stock transformers
does not know the type and says so, where it would have filled the unknown layers with random
numbers had the type stayed ``llama``.
"""

from __future__ import annotations

import functools
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from compress.checkpoint.embeddings import (
    has_packed_embeddings,
    place_embeddings,
    reading_embeddings,
    settle_embeddings,
)
from compress.checkpoint.guards import guarded
from compress.checkpoint.records import BlockRecord, apply_record, module_specs
from compress.checkpoint.serving import stored_state
from compress.checkpoint.stock import OWN, own_head_dim
from compress.errors import CompressError
from compress.linear.layer import serve
from compress.models.anatomy import find_blocks

# Auto class -> the table of its stock classes.
_AUTO = {
    "AutoModel": "MODEL_MAPPING",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
}


@functools.cache
def own_config_class(base_type: str) -> type[PreTrainedConfig]:
    """Return the config class ``compress_<base_type>``, made and registered at the first call
    together with its model classes.

    Raises:
        CompressError: transformers has no such base type.
    """
    if base_type not in CONFIG_MAPPING:
        raise CompressError("a model type that transformers knows", repr(base_type))
    base = CONFIG_MAPPING[base_type]
    config_class = type(base)(
        OWN + base.__name__,
        (base,),
        {
            "model_type": f"compress_{base_type}",
            "__module__": __name__,
            "__doc__": f"{base.__name__} of a model with layers of compress.linear.layer.",
        },
    )
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for auto_name, table in _AUTO.items():
        stock = getattr(transformers, table).get(base, None)
        if stock is not None:
            stock = stock[0] if isinstance(stock, tuple) else stock
            getattr(transformers, auto_name).register(config_class, _own_class(stock, config_class))
    return config_class


def _own_class(
    stock: type[PreTrainedModel], config_class: type[PreTrainedConfig]
) -> type[PreTrainedModel]:
    """Return a subclass of a stock model that puts the new modules in as it is built."""

    def __init__(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any):
        if own_head_dim(config):
            # Here alone: reading any other model has nothing to do with block classes.
            from compress.checkpoint.per_layer import register_block_class

            register_block_class(config)
        stock.__init__(self, config, *args, **kwargs)
        place_modules(self)
        place_embeddings(self)
        # Guards in the file are no weights left over: none is missing.
        self._keys_to_ignore_on_load_unexpected |= guarded(config)

    def from_pretrained(cls: type[PreTrainedModel], *args: Any, **kwargs: Any):
        with reading_embeddings():
            made = super(own, cls).from_pretrained(*args, **kwargs)
        model = made[0] if isinstance(made, tuple) else made
        settle_embeddings(model)
        serve(model)
        return made

    def save_pretrained(self: PreTrainedModel, *args: Any, **kwargs: Any):
        if has_packed_embeddings(self):
            kwargs.setdefault("state_dict", stored_state(self))
        super(own, self).save_pretrained(*args, **kwargs)

    own = type(stock)(
        OWN + stock.__name__,
        (stock,),
        {
            "__init__": __init__,
            "from_pretrained": classmethod(from_pretrained),
            "save_pretrained": save_pretrained,
            "__module__": __name__,
            "__doc__": f"{stock.__name__} with layers of compress.linear.layer.",
            "config_class": config_class,
        },
    )
    return own


def place_modules(model: PreTrainedModel) -> None:
    """Replace linears by the modules that the model's config names, without values."""
    _, blocks = find_blocks(model)
    for block, specs in zip(blocks, module_specs(model.config, len(blocks)), strict=True):
        apply_record(block, BlockRecord(modules=specs))
