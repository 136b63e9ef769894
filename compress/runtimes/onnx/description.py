"""What an exported folder holds, in a file beside the graph, and whether it still does."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from compress.errors import CompressError
from compress.system.files import content_digest
from compress.system.intake import reason

DESCRIPTION = "compress_onnx.json"


class OnnxDescription(BaseModel):
    """What an exported folder holds; ``compress_onnx.json``.

    Attributes:
        kind: causal or masked.
        positions: tokens that the model reads, cache included.
        kv_heads: a layer with attention -> its key and value heads, in the order of the graph.
        files: names of the graph's files -> their bytes and digest.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = 1
    kind: str
    positions: int
    vocabulary: int
    head_dim: int = 0
    kv_heads: dict[int, int] = {}
    activations: str = "float32"
    files: dict[str, tuple[int, str]]


def read_description(folder: Path) -> OnnxDescription:
    """What an exported folder says of itself.

    Raises:
        CompressError: no such folder, or files that are not those that were written.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        raise CompressError(
            f"a folder that `compress export --to onnx` wrote, with {DESCRIPTION}",
            f"{folder} without it", "Export the model first",
        )  # fmt: skip
    try:
        description = OnnxDescription.model_validate(json.loads(path.read_text("utf-8")))
    except ValueError as error:
        raise CompressError(f"a description of the model in {path}", reason(error)) from error
    for name, (size, digest) in description.files.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size or content_digest(file) != digest:
            raise CompressError(
                f"{name} as it was exported", f"another file, or none, in {folder}",
                "It was edited or cut short on its way: export or copy it again",
            )  # fmt: skip
    return description
