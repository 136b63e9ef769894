"""What ``import compress`` changes in the process: three hooks, and nothing until they are needed.

The hooks fire when transformers is imported (or at once, if it already is). They make model types
named ``compress_*`` known by name only, watch for configs that carry both ``per_layer_config`` and
our ``compress`` section, and have quantised checkpoints read by a quantizer that keeps weights
packed. Classes are made, and constructors of blocks wrapped, when the first checkpoint that needs
them is opened; models without our section are built as they always were.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from wrapt import register_post_import_hook

_CONFIGS = "transformers.models.auto.configuration_auto"
_PER_LAYER = "transformers.integrations.heterogeneity.configuration_utils"
_QUANTIZERS = "transformers.quantizers.auto"
_installed = False


def install_hooks() -> None:
    """Let plain ``AutoModel….from_pretrained`` open what this toolkit writes. Idempotent."""
    global _installed
    if not _installed:
        _installed = True
        register_post_import_hook(_name_own_types, _CONFIGS)
        register_post_import_hook(_watch_per_layer_configs, _PER_LAYER)
        register_post_import_hook(_keep_weights_packed, _QUANTIZERS)


def _name_own_types(module: ModuleType) -> None:
    """Register a placeholder for the own counterpart of every model type that transformers has.

    Any of them may have been compressed, in the table of families or not. Making the true classes
    would import hundreds of model families; placeholders take some 13 ms in all.
    """
    for base in tuple(module.CONFIG_MAPPING_NAMES):
        placeholder = type("CompressConfig", (_Placeholder,), {"base": base})
        module.AutoConfig.register(f"compress_{base}", placeholder, exist_ok=True)


class _Placeholder:
    """Stands for an own config class until one is asked for; then makes it and gives way to it."""

    base = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        from compress.checkpoint.architectures import own_config_class

        return own_config_class(cls.base)(*args, **kwargs)

    @classmethod
    def from_dict(cls, values: dict[str, Any], **kwargs: Any) -> Any:
        from compress.checkpoint.architectures import own_config_class

        return own_config_class(cls.base).from_dict(values, **kwargs)


def _watch_per_layer_configs(module: ModuleType) -> None:
    mixin = module.HeterogeneousConfigMixin
    stock = mixin.per_layer_config

    def setter(config: Any, value: Any) -> None:
        stock.fset(config, value)
        if value and getattr(config, "compress", None) is not None:
            from compress.checkpoint.per_layer import register_block_class

            register_block_class(config)

    mixin.per_layer_config = property(stock.fget, setter, stock.fdel, stock.__doc__)


def _keep_weights_packed(module: ModuleType) -> None:
    def make(*args: Any, **kwargs: Any) -> Any:
        from compress.checkpoint.serving import make_quantizer

        return make_quantizer(*args, **kwargs)

    module.AUTO_QUANTIZER_MAPPING["compressed-tensors"] = make
