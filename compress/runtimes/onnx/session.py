"""onnxruntime's session of a graph, and the cache that a graph reads and writes in place."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress.errors import CompressError
from compress.runtimes.onnx.description import OnnxDescription
from compress.system.intake import reason


def open_session(folder: Path, threads: int | None) -> Any:
    """An onnxruntime session of the graph in a folder, on the CPU.

    Raises:
        CompressError: onnxruntime is missing, or refuses the graph.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise CompressError(
            "the package onnxruntime", "a Python without", "pip install onnxruntime"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(
            os.fspath(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # its errors are of many classes of its own
        raise CompressError(
            f"a graph that onnxruntime {onnxruntime.__version__} runs in {folder}", reason(error),
            "Export the model anew with the versions that are installed",
        ) from error  # fmt: skip


class Cache:
    """Keys and values of up to ``places`` tokens, in buffers that the graph writes in place.

    Attributes:
        length: tokens in it.
        binding: the buffers as a session's inputs and outputs, once one has run with them.
    """

    def __init__(self, description: OnnxDescription, batch: int, places: int) -> None:
        self.places, self.length = places, 0
        self.binding: Any = None
        self.buffers = {
            (kind, index): np.zeros((batch, heads, places, description.head_dim), np.float32)
            for index, heads in description.kv_heads.items()
            for kind in ("key", "value")
        }

    def grow(self, places: int) -> None:
        """Make room for more tokens."""
        self.places, self.binding = places, None
        for key, old in self.buffers.items():
            self.buffers[key] = np.zeros((*old.shape[:2], places, old.shape[3]), np.float32)
            self.buffers[key][:, :, : self.length] = old[:, :, : self.length]
