"""From a model state to a checkpoint folder, and the proof that the folder is that model."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from compress.checkpoint.fresh import prove_fresh
from compress.checkpoint.guards import guards
from compress.checkpoint.mask_file import PackedPattern, nonzero_mask, save_masks
from compress.checkpoint.records import (
    apply_record,
    joined_experts,
    needs_own_experts,
    without_experts,
)
from compress.checkpoint.save import verify, verify_shapes, write_config
from compress.checkpoint.state import ModelState, SourceBlock, streamed_logits
from compress.checkpoint.storage import Storage
from compress.checkpoint.stored import opened_block
from compress.errors import CompressError
from compress.linear.matrix import matrix
from compress.linear.pattern import UNSTRUCTURED
from compress.models.images import random_image, reads_images
from compress.models.positions import positions_of
from compress.models.side_files import COMPANIONS
from compress.models.sources.source import Source, load_config
from compress.system.files import whole_folder
from compress.system.shards import ShardWriter, TensorSpec
from compress.system.tensors import TensorIndex, check_finite


def export(
    state: ModelState, source: Source, folder: Path, storage: Storage, max_shard_bytes: int
) -> None:
    """Write the checkpoint under a temporary name and rename it when it is whole.

    Memory holds one tensor at a time, of experts that are stored in one tensor a block's.

    Raises:
        CompressError: the disk is full; nothing is left behind.
    """
    advice = "Make room and run the same command again; finished steps are kept"
    with whole_folder(folder, "the checkpoint", advice) as partial:
        specs = {name: spec for name, spec, _ in _tensors(state, storage, shapes_only=True)}
        with ShardWriter(partial, specs, max_shard_bytes) as writer:
            for name, _, tensor in _tensors(state, storage):
                if tensor.is_floating_point():
                    kind = str(tensor.dtype).removeprefix("torch.")
                    check_finite(name, tensor, where=f"the result in {kind}")
                writer.write(name, tensor)
        config = state.config
        config.dtype = storage.dtype
        write_config(config, partial)
        for path in companions(source, state.trust_remote_code):
            shutil.copyfile(path, partial / path.name)


def companions(source: Source, code: bool) -> list[Path]:
    """Files of a model that its result gets as they are, in the order of their names.

    Links that lead out of the model's folder are left out: what they lead to is not the model's.
    A hub snapshot, wherever it lies, is all links, into the folder of its repository's blobs.

    Args:
        code: whether its Python files belong to them.
    """
    return [path for path, own in _companions(source, code) if own]


def foreign_links(source: Source, code: bool) -> list[str]:
    """Names of what would be companions if it did not lie outside the model's folder."""
    return [path.name for path, own in _companions(source, code) if not own]


def _companions(source: Source, code: bool) -> list[tuple[Path, bool]]:
    """Files with the names of companions, each with whether it lies in a place of the model's."""
    home = source.folder.resolve()
    places = [home]
    if home.parent.name == "snapshots":
        places.append(home.parent.parent / "blobs")
    found = {
        path
        for pattern in (*COMPANIONS, *(("*.py",) if code else ()))
        for path in source.folder.glob(pattern)
        if path.is_file()
    }
    return [
        (path, any(path.resolve().is_relative_to(place) for place in places))
        for path in sorted(found)
    ]


def _tensors(
    state: ModelState, storage: Storage, shapes_only: bool = False
) -> Iterator[tuple[str, TensorSpec | None, torch.Tensor | None]]:
    """All tensors under their final names, one in memory at a time."""
    prefix = state.blocks_path + "."

    def item(name: str, tensor: torch.Tensor):
        return name, TensorSpec.of(tensor), None if shapes_only else tensor

    for name in state.source.names():
        if not name.startswith(prefix):
            yield item(name, storage.outside(name, state.source.get(name)))
    own = needs_own_experts(state.records)
    for index, place in enumerate(state.blocks):
        target, record = f"{prefix}{index}.", state.records[index]
        for name, guard in guards(record if own else without_experts(record)).items():
            yield item(target + name, storage.in_block(name, guard))
        found = _of_block(state, place)
        for name, tensor in found if own else joined_experts(found, record):
            yield item(target + name, storage.in_block(name, tensor))


def _of_block(state: ModelState, place: SourceBlock | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """A block's tensors, names relative to it."""
    if isinstance(place, SourceBlock):
        for name in state.source.names():
            if name.startswith(place.prefix):
                yield name.removeprefix(place.prefix), state.source.get(name)
        return
    with opened_block(place) as file:
        for name in file.keys():  # noqa: SIM118
            yield name, file.get_tensor(name)


def export_masks(state: ModelState, folder: Path, base_digest: str) -> Path | None:
    """Write the packed sidecar ``masks.safetensors`` of all N:M sparse linears beside the weights.

    A mask can then be put onto the original weights again, or start another run. None is written
    where no linear is N:M sparse, or the pattern has too many candidates to pack.
    """
    streamed = state.streamed()
    layout: dict[str, tuple[PackedPattern, tuple[int, int]]] = {}
    for anatomy, record in zip(streamed.anatomy.blocks, state.records, strict=True):
        block = streamed.model.get_submodule(anatomy.path)
        apply_record(block, record)
        for path, text in record.zeros.items():
            if text == UNSTRUCTURED:
                continue
            try:
                pattern = PackedPattern.parse(text)
            except CompressError:
                return None
            shape = tuple(matrix(block.get_submodule(path)).shape)
            layout[f"{anatomy.path}.{path}.weight"] = (pattern, shape)
    if not layout:
        return None
    # A record that was read back from the journal lists its paths in another order than a new one.
    layout = dict(sorted(layout.items()))
    return save_masks(folder, layout, _masks(state, layout), base_digest)


def _masks(
    state: ModelState, layout: dict[str, tuple[PackedPattern, tuple[int, int]]]
) -> Iterator[tuple[str, torch.Tensor]]:
    streamed = state.streamed()
    for index, (anatomy, record) in enumerate(
        zip(streamed.anatomy.blocks, state.records, strict=True)
    ):
        names = {p: f"{anatomy.path}.{p}.weight" for p in record.zeros}
        names = {p: n for p, n in names.items() if n in layout}
        if not names:
            continue
        block = streamed.block(index)
        state.load(index, block, streamed.anatomy)
        for path, name in names.items():
            yield name, nonzero_mask(matrix(block.get_submodule(path)), layout[name][0])
        streamed.release_block(index)


def _probe(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """Inputs to compare two models on: random tokens, or a random image for vision encoders."""
    if reads_images(config):
        return random_image(config)
    generator = torch.Generator().manual_seed(0)
    vocabulary = config.get_text_config().vocab_size
    length = min(16, positions_of(config) or 16)
    return {"input_ids": torch.randint(vocabulary, (1, length), generator=generator)}


def check_export(
    state: ModelState,
    folder: Path,
    storage: Storage,
    scratch: Path,
    device: torch.device | str,
    whole: bool,
    fresh: bool,
    imports: tuple[str, ...] = (),
) -> dict[str, float | str]:
    """Load what was written and compare its logits with those of the blocks in the run's folder.

    Args:
        whole: load the model whole through plain ``from_pretrained``; else block by block, after a
            comparison of all names and shapes with what the written config builds.
        fresh: load it, or compare its shapes, in a process that has only imported the package; see
            :mod:`compress.checkpoint.fresh`.
        imports: code that such a process runs first.

    Returns:
        How it was checked, in which process, and the largest difference of logits relative to the
        largest logit.

    Raises:
        CompressError: the checkpoint is not the model.
    """
    batch = _probe(state.config)
    expected = streamed_logits(state, batch, scratch, device, storage)
    trust = state.trust_remote_code
    process = "fresh" if fresh else "this"
    if whole:
        prove = functools.partial(prove_fresh, imports=imports) if fresh else verify
        error = prove(folder, expected, batch, trust_remote_code=trust)
        return {"through": "from_pretrained", "process": process, "relative_error": error}
    prove_shapes = functools.partial(prove_fresh, imports=imports) if fresh else verify_shapes
    prove_shapes(folder, trust_remote_code=trust)
    again = ModelState.of_checkpoint(
        TensorIndex.open(folder), load_config(folder, trust_remote_code=trust), trust
    )
    difference = (streamed_logits(again, batch, scratch, device) - expected).abs().max()
    error = float(difference / expected.abs().max())
    if not error <= 1e-4:
        raise CompressError(
            f"the checkpoint in {folder} to give the logits of the compressed model",
            f"a relative difference of {error:.2e}",
            "This is a defect of the toolkit: please report it with the recipe",
        )
    return {"through": "streaming", "process": process, "relative_error": error}
