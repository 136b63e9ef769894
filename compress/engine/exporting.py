"""A checkpoint in the format of another runtime: what `compress export` and the API call."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal, get_args

from compress.errors import CompressError
from compress.models.sources.source import load_tokenizer, resolve
from compress.planning.export_check import check_options
from compress.runtimes.requirements import require
from compress.system.intake import user_path

Format = Literal["gguf", "onnx"]


def export(
    model: str | os.PathLike[str],
    to: Format,
    out: str | os.PathLike[str],
    *,
    type: str = "auto",
    embeddings: str = "auto",
    activations: str = "int8",
    tokenizer: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Write a model for llama.cpp (``gguf``) or onnxruntime (``onnx``).

    Args:
        model: what :func:`compress.load` takes.
        out: a file that does not exist (gguf), a new or empty folder (onnx).
        type: gguf: the type of the blocks' linears; see
            :func:`compress.runtimes.gguf.export.export_gguf`.
        embeddings: the type of embedding and head; "auto" keeps them as they are.
        activations: onnx: what inputs of weight-only integers are multiplied in, "int8" or
            "float32"; see :func:`compress.runtimes.onnx.export.export_onnx`.
        tokenizer: gguf: whether the file gets the tokenizer.

    Returns:
        What was written: a ``GGUFExport`` or an ``OnnxExport``.

    Raises:
        CompressError: a missing package, a model that the runtime cannot run, an option that the
            format does not have.
    """
    if to not in get_args(Format):
        raise CompressError(f"a format ({', '.join(get_args(Format))})", repr(to))
    require(to)
    place = user_path(out, "a new file or folder for the exported model")
    check_options(to, type=type, embeddings=embeddings, activations=activations)
    source = resolve(model, cache_dir=cache_dir, trust_remote_code=trust_remote_code)
    if to == "gguf":
        from compress.runtimes.gguf.export import export_gguf

        return export_gguf(
            source, place, type=type, embeddings=embeddings, tokenizer=tokenizer,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
    from compress.runtimes.onnx.export import export_onnx

    return export_onnx(
        source, place, embeddings=embeddings, activations=activations,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip


def load_exported(folder: str | os.PathLike[str]) -> tuple[Any, Any]:
    """A model that :func:`export` wrote for onnxruntime, and its tokenizer (None without one).

    Raises:
        CompressError: a missing package, no such folder, or files that have changed since.
    """
    require("onnx")
    from compress.runtimes.onnx.model import load_onnx

    place = user_path(folder, "a folder with an exported model")
    return load_onnx(place), load_tokenizer(place)[0]


def check_runtime(runtime: str) -> bool:
    """Whether a runtime is another one than torch, whose packages are then known to be there.

    Raises:
        CompressError: an unknown runtime, or a missing package.
    """
    if runtime == "torch":
        return False
    if runtime != "onnx":
        raise CompressError("a runtime (torch, onnx)", repr(runtime))
    require("onnx")
    return True


def exported_digest(folder: Path) -> str:
    """Digest of the graph and the weights in an exported folder, which it is held to."""
    from compress.runtimes.onnx.description import read_description

    files = read_description(folder).files
    return hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()
