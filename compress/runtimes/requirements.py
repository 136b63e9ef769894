"""What each runtime needs installed, for writing its format and for running what was written."""

from __future__ import annotations

import importlib.util

from compress.errors import CompressError

NAMES = {"transformers": "transformers", "onnx": "onnxruntime", "gguf": "llama.cpp"}
# Format -> modules and the packages that bring them. Those of onnx are the optional extra `onnx`.
_WRITING = {"gguf": {"gguf": "gguf"}, "onnx": {"onnx": "onnx", "onnxruntime": "onnxruntime"}}
_RUNNING = {"gguf": {"llama_cpp": "llama-cpp-python"}, "onnx": {"onnxruntime": "onnxruntime"}}


def require(to: str, *, running: bool = False) -> None:
    """Raise unless the packages of a format are installed.

    Args:
        running: those that run a model in it, too.

    Raises:
        CompressError: naming them, with the line that installs them.
    """
    modules = {**_WRITING[to], **(_RUNNING[to] if running else {})}
    missing = [package for name, package in modules.items() if not _found(name)]
    if missing:
        needs = f"running {to}" if running else to
        raise CompressError(
            f"{' and '.join(missing)}, the packages that {needs} needs", "a Python without",
            f"pip install {' '.join(missing)}",
        )  # fmt: skip


def _found(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
