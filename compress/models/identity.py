"""Which model a folder holds: a digest of everything in it that decides what is computed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from compress.models.loading import read_config
from compress.system.tensors import TensorIndex, file_sha256

# Tokenizers, codebooks, generation options and code that lie beside the weights.
_BESIDE = (".json", ".jinja", ".model", ".py", ".safetensors", ".txt")


def model_digest(folder: Path) -> str:
    """sha256, as hex, of a checkpoint's weights, config and the files beside them.

    The same wherever the folder lies and whichever transformers wrote its config. A file is hashed
    once a process as long as its size and modification time stay the same.

    Raises:
        CompressError: no config.json, one that does not parse, or no safetensors checkpoint.
    """
    index = TensorIndex.open(folder)
    config = read_config(folder)
    config.pop("transformers_version", None)  # of who wrote it, not of the model
    hashed = {Path(path).name for path in index.files} | {"config.json"}
    beside = {
        path.name: file_sha256(path)
        for path in sorted(folder.iterdir())
        if path.suffix in _BESIDE and path.name not in hashed and path.is_file()
    }
    told = {"weights": index.digest(), "config": config, "beside": beside}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
