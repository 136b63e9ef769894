"""A checkpoint in the format of another runtime: what `compress export` and the API call."""

from __future__ import annotations

import importlib.util
import os
from typing import Any, Literal, get_args

from compress.errors import CompressError
from compress.models.sources.source import resolve
from compress.system.intake import user_path

Format = Literal["gguf", "onnx"]
# Packages that a format needs; those of onnx are the optional extra `onnx`.
_PACKAGES = {"gguf": ("gguf",), "onnx": ("onnx", "onnxruntime")}


def export(
    model: str | os.PathLike[str],
    to: Format,
    out: str | os.PathLike[str],
    *,
    type: str = "auto",
    embeddings: str = "auto",
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
        tokenizer: whether the file gets the tokenizer.

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
    _check_types(to, type, embeddings)
    source = resolve(model, cache_dir=cache_dir, trust_remote_code=trust_remote_code)
    if to == "gguf":
        from compress.runtimes.gguf.export import export_gguf

        return export_gguf(
            source, place, type=type, embeddings=embeddings, tokenizer=tokenizer,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
    from compress.runtimes.onnx.export import export_onnx

    return export_onnx(source, place, embeddings=embeddings, trust_remote_code=trust_remote_code)


def require(to: str) -> None:
    """Raise unless the packages of a format are installed."""
    missing = [name for name in _PACKAGES[to] if importlib.util.find_spec(name) is None]
    if missing:
        raise CompressError(
            f"the package {' and '.join(missing)}, which {to} needs", "a Python without",
            f"pip install {' '.join(missing)}",
        )  # fmt: skip


def _check_types(to: str, type: str, embeddings: str) -> None:
    if to == "gguf":
        from compress.runtimes.gguf.blocks import ALL_TYPES

        known: dict[str, tuple[str, ...]] = {"type": ALL_TYPES, "embeddings": ALL_TYPES}
    else:
        known = {"type": ("auto",), "embeddings": ("auto", "8", "4")}
    for option, value in (("type", type), ("embeddings", embeddings)):
        if value not in known[option]:
            raise CompressError(
                f"--{option} for {to} to be one of {', '.join(known[option])}", repr(value)
            )
