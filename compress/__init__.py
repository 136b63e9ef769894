"""Compress trained transformers: prune, factorise and quantise, then tell the truth about it.

    import compress

    model = compress.apply(model, ["magnitude"])                     # a live model, in place
    compress.save(model, "smaller", tokenizer)
    compress.run("quickstart", out="runs/quickstart")                # a recipe, start to report
    compress.evaluate("smaller", {"text": {"source": "words.txt"}})  # what a model is worth

Importing the package also makes every checkpoint that it writes loadable by plain
``AutoModelFor….from_pretrained``.
"""

from __future__ import annotations

import importlib
from typing import Any

from compress.checkpoint.hooks import install_hooks
from compress.errors import CompressError
from compress.system.version import VERSION as __version__

install_hooks()

# Resolved on first use: torch and transformers take seconds to import.
_EXPORTS = {
    "apply": "compress.api",
    "apply_mask": "compress.api",
    "compare": "compress.api",
    "evaluate": "compress.api",
    "export": "compress.api",
    "inspect": "compress.api",
    # Not `methods`: that is the subpackage, once something has imported it.
    "list_methods": "compress.api",
    "load": "compress.api",
    "materialize": "compress.api",
    "plan": "compress.api",
    "push": "compress.api",
    "register_family": "compress.models.described",
    "register_method": "compress.methods.catalog",
    "run": "compress.api",
    "save": "compress.api",
}
__all__ = ["CompressError", "__version__", *sorted(_EXPORTS)]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
