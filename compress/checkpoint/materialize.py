"""A checkpoint with layers of our own as one of plain linears, for readers that know no layers."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from compress.checkpoint.config import apply_records
from compress.checkpoint.export import export
from compress.checkpoint.records import BlockRecord, dump_block
from compress.checkpoint.save import require_empty, verify_shapes
from compress.checkpoint.state import ModelState, SourceBlock
from compress.checkpoint.stock import stock_config
from compress.checkpoint.storage import Storage
from compress.errors import CompressError
from compress.linear.layer import CONVERTED, EXPERTS, Layer
from compress.linear.matrix import is_conv1d
from compress.models.anatomy import find_blocks
from compress.models.sources.source import load_config, resolve
from compress.models.stream import build_meta
from compress.system.files import disk_error, new_folder, scratch_folder
from compress.system.intake import at_home
from compress.system.shards import MAX_SHARD_BYTES
from compress.system.tensors import TensorIndex


def materialize(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> int:
    """Write a model with every layer of our own replaced by the dense matrix that it stands for.

    The result computes the same and loads without this package, unless something else in it needs
    that too; it is as large as if the layers had never been. One block is in memory at a time.

    Args:
        model: a checkpoint with low-rank, dense-sparse or other layers.
        out: new or empty folder, which appears whole or not at all.
        max_shard_bytes: size at which a new weights file is started.

    Returns:
        How many layers were replaced.

    Raises:
        CompressError: a model without layers; a full disk.
    """
    folder = at_home(out).absolute()
    require_empty(folder)
    found = resolve(model, cache_dir=cache_dir, trust_remote_code=trust_remote_code)
    config = load_config(found.folder, trust_remote_code=trust_remote_code)
    state = ModelState.of_checkpoint(TensorIndex.open(found.folder), config, trust_remote_code)
    layers = [_layers(record) for record in state.records]
    if not any(layers):
        raise CompressError(
            "a model with layers that stand for matrices", f"none in {found.origin}",
            "It is what it would become: use it as it is",
        )  # fmt: skip
    with (
        scratch_folder(folder.parent, f".{folder.name}-blocks.") as scratch,
        new_folder(folder, "the checkpoint") as partial,
    ):
        storage = Storage.like(state.source, state.blocks_path)
        plain = _materialized(state, layers, scratch, storage)
        export(plain, found, partial, storage, max_shard_bytes)
        if not trust_remote_code:
            verify_shapes(partial)
    return sum(map(len, layers))


def _layers(record: BlockRecord) -> list[str]:
    """Paths of the layers of a block."""
    return [path for path, spec in record.modules.items() if spec.kind not in (CONVERTED, EXPERTS)]


def _materialized(
    state: ModelState, layers: list[list[str]], scratch: Path, storage: Storage
) -> ModelState:
    """The state whose blocks with layers are files of plain linears."""
    streamed = state.streamed()
    _, stock = find_blocks(build_meta(stock_config(state.config), state.trust_remote_code))
    records, places = list(state.records), list(state.blocks)
    for index, paths in enumerate(layers):
        if not paths:
            continue
        block, anatomy = streamed.block(index), streamed.anatomy.blocks[index]
        state.load(index, block, streamed.anatomy)
        for path in paths:
            transposed = is_conv1d(stock[index].get_submodule(path))
            block.set_submodule(path, _plain(block.get_submodule(path), transposed))
        tensors, records[index] = dump_block(block, anatomy, storage.dtype, storage.wide_in_blocks)
        places[index] = scratch / f"{index:05d}.safetensors"
        try:
            save_file(tensors, places[index], {"format": "pt"})
        except OSError as error:
            raise disk_error(scratch, error) from error
        streamed.release_block(index)
    written = apply_records(state.config, streamed.anatomy.family, records, state.blocks_path)
    blocks: tuple[SourceBlock | Path, ...] = tuple(places)
    return replace(state, config=written, records=tuple(records), blocks=blocks)


def _plain(layer: nn.Module, transposed: bool) -> nn.Module:
    """The linear, or the ``Conv1D``, that computes what a layer does."""
    assert isinstance(layer, Layer)
    with torch.device("meta"):
        made: nn.Module
        if transposed:
            made = Conv1D(layer.out_features, layer.in_features)
        else:
            made = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    weight = layer.dense()
    weight = weight.t() if transposed else weight
    made.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if transposed and layer.bias is None:
        made.bias = nn.Parameter(torch.zeros(layer.out_features), requires_grad=False)
    else:
        made.bias = layer.bias
    return made
