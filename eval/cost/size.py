"""Parameters and bytes: of the model in memory, and of the files on disk."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from compress.errors import CompressError
from compress.linear.layer import Layer
from compress.linear.tables import PackedEmbedding

# What a quantised module stores beside its weight: no parameters of the model.
_METADATA = ("_scale", "_zero_point", "_g_idx", "_global_scale", "_shape")


class Size(BaseModel):
    """Counts of logical weights (a packed or tied weight counts once, at its unpacked size)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    parameters: int = Field(description="all parameters, tied ones once")
    nonzero_parameters: int = Field(description="those that are not zero")
    parameters_without_embeddings: int = Field(
        description="without embedding tables and the output projection"
    )
    block_weights: int = Field(description="weights of the matrices inside the blocks")
    nonzero_block_weights: int
    checkpoint_bytes: int | None = Field(
        description="bytes of the safetensors files of the weights"
    )
    block_bytes: int | None = Field(
        description="bytes on disk of those matrices, with scales, zero points and indices"
    )
    bits_per_weight: float | None = Field(description="8 * block_bytes / block_weights")


class Weight(NamedTuple):
    """One logical parameter: its path, its size, how many of its values are not zero, its rank."""

    name: str
    numel: int
    nonzero: int
    dim: int


def size(model: nn.Module, folder: str | Path | None = None) -> Size:
    """Count the parameters of ``model`` and the bytes of its checkpoint in ``folder``.

    Raises:
        CompressError: ``folder`` holds no readable safetensors checkpoint.
    """
    weights = list(logical_weights(model))
    blocks = blocks_name(model)
    packed = [m.table for m in model.modules() if isinstance(m, PackedEmbedding)]
    ends = {model.get_output_embeddings(), *packed}
    edges = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) or module in ends
    }
    inside = [w for w in weights if w.dim > 1 and blocks and w.name.startswith(blocks + ".")]
    block_weights = sum(w.numel for w in inside)
    total = file_bytes = None
    if folder is not None:
        header = checkpoint_tensors(folder)
        total = sum(f.stat().st_size for f in weight_files(folder))
        file_bytes = _block_bytes(header, blocks, model.base_model_prefix)
    return Size(
        parameters=sum(w.numel for w in weights),
        nonzero_parameters=sum(w.nonzero for w in weights),
        parameters_without_embeddings=sum(
            w.numel for w in weights if w.name.rpartition(".")[0] not in edges
        ),
        block_weights=block_weights,
        nonzero_block_weights=sum(w.nonzero for w in inside),
        checkpoint_bytes=total,
        block_bytes=file_bytes,
        bits_per_weight=8 * file_bytes / block_weights if file_bytes and block_weights else None,
    )


def logical_weights(model: nn.Module) -> Iterator[Weight]:
    """Yield every parameter once, quantised ones at their unpacked size."""
    seen: set[int] = set()
    tables: set[int] = set()  # of layers that share one
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        dense = _dense_weight(module, own)
        if dense is not None:
            yield _weight(f"{path}.weight", dense)
            own = {k: v for k, v in own.items() if k != "weight" and not k.startswith("weight_")}
        elif isinstance(module, Layer) and _packs(module):
            held, table = module.size(), next(module.buffers(), None)
            shared = table is not None and table.data_ptr() in tables
            tables |= {table.data_ptr()} if table is not None else set()
            if held.weights and not shared:
                yield Weight(f"{path}.weight", held.weights, held.nonzero, 2)
        for name, parameter in own.items():
            if id(parameter) in seen or name.endswith(_METADATA):
                continue
            seen.add(id(parameter))
            yield _weight(f"{path}.{name}" if path else name, parameter)


def _packs(layer: Layer) -> bool:
    """Whether the numbers of a layer are no parameters, of itself or of modules in it."""
    alone = not any(True for _ in layer.children())
    return alone and all(p is layer.bias for p in layer.parameters())


def _weight(name: str, tensor: Tensor) -> Weight:
    nonzero = tensor.numel() if tensor.is_meta else int(torch.count_nonzero(tensor))
    return Weight(name, tensor.numel(), nonzero, tensor.dim())


def _dense_weight(module: nn.Module, own: dict[str, Tensor]) -> Tensor | None:
    """Return the unpacked weight of a compressed-tensors module, or None for a plain one."""
    scheme = getattr(module, "quantization_scheme", None)
    stored = own.get("weight_packed", own.get("weight"))
    if scheme is None or stored is None or stored.dtype in _COMPUTE_DTYPES:
        return None
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format

    name = scheme.format or infer_module_format(type(module), scheme)
    compressor = BaseCompressor.get_value_from_registry(getattr(name, "value", name))
    state = {**own, **dict(module.named_buffers(recurse=False))}
    return compressor.decompress({k: v.data for k, v in state.items()}, scheme)["weight"]


_COMPUTE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def blocks_name(model: nn.Module) -> str:
    """Return the path of the list of blocks: the longest ModuleList inside no other one."""
    lists: dict[str, int] = {}
    for name, module in model.named_modules():
        nested = any(name.startswith(outer + ".") for outer in lists)
        if isinstance(module, nn.ModuleList) and not nested:
            lists[name] = len(module)
    return max(lists, key=lists.__getitem__, default="")


def weight_files(folder: str | Path) -> list[Path]:
    """Return the safetensors files that hold the weights of the checkpoint in ``folder``.

    Raises:
        CompressError: there are none, or the index names one that is missing.
    """
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = [folder / Path(name).name for name in sorted(names)]
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise CompressError(
                "a safetensors checkpoint", f"no {file.name} in {folder}", where="cost"
            )
    return files


def checkpoint_tensors(folder: str | Path) -> dict[str, dict[str, Any]]:
    """Read the headers: tensor name -> {"dtype", "shape", "data_offsets"}; no tensor is read.

    Raises:
        CompressError: a file is missing or cut short.
    """
    tensors: dict[str, dict[str, Any]] = {}
    for file in weight_files(folder):
        with file.open("rb") as stream:
            try:
                (length,) = struct.unpack("<Q", stream.read(8))
                if length > file.stat().st_size:
                    raise ValueError("header longer than the file")
                header = json.loads(stream.read(length))
            except (struct.error, ValueError) as error:
                raise CompressError(
                    "a safetensors file",
                    f"{file.name} with a broken header ({error})",
                    "Download or write the checkpoint again",
                    where="cost",
                ) from None
        tensors.update({k: v for k, v in header.items() if k != "__metadata__"})
    return tensors


def _block_bytes(header: dict[str, dict[str, Any]], blocks: str, base: str) -> int:
    """Sum the bytes of every matrix in the blocks, and all its module stores except biases."""
    # A base model saved alone writes its names without the prefix of the head's attribute.
    prefixes = {blocks + "."}
    if base and blocks.startswith(base + "."):
        prefixes.add(blocks[len(base) + 1 :] + ".")
    inside = {k: v for k, v in header.items() if k.startswith(tuple(prefixes))}
    matrices = {k.rpartition(".")[0] for k, v in inside.items() if len(v["shape"]) > 1}
    return sum(
        v["data_offsets"][1] - v["data_offsets"][0]
        for k, v in inside.items()
        if k.rpartition(".")[0] in matrices and not k.endswith(".bias")
    )


def human_bytes(count: float) -> str:
    """Return bytes in units of 1000 (as disks are sold): 269 MB."""
    units = ("B", "kB", "MB", "GB", "TB")
    step = min(len(units) - 1, int(math.log(max(count, 1), 1000)))
    value = count / 1000**step
    return f"{value:.0f} B" if step == 0 else f"{value:.3g} {units[step]}"
