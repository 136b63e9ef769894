"""A model between two steps: its config, what each block is, and which file holds it.

Finished blocks are small safetensors files, tensors named relative to the block and already in the
form of the final checkpoint. Nothing is copied that did not change: blocks that no step has touched
stay in the source checkpoint, and dropping a block is dropping an entry of a list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from compress.checkpoint.config import apply_records, keep_layers, read_records
from compress.checkpoint.embeddings import UnpackedTensors, read_embeddings
from compress.checkpoint.records import BlockRecord, load_block, with_experts
from compress.checkpoint.storage import FLOAT32, Storage
from compress.checkpoint.stored import (
    ModelTensors,
    OuterTensors,
    RoundedTensors,
    StoredTensors,
    opened_block,
    stored_names,
)
from compress.linear.grid import QuantScheme
from compress.models.anatomy import Anatomy, family_of
from compress.models.calls import capture_inputs
from compress.models.config_limits import check_layers
from compress.models.groups import Groups, merged_origins
from compress.models.halves import tail_logits
from compress.models.stream import StreamedModel, build_meta
from compress.models.supported import check_own_weights
from compress.system.tensors import TensorIndex, check_finite


@dataclass(frozen=True)
class SourceBlock:
    """A block that is still where it came from."""

    prefix: str  # path of the block in the source, with a final dot


@dataclass(frozen=True)
class ModelState:
    """A model as it is between two steps.

    Attributes:
        source: the checkpoint the run started from; outer tensors that a step has changed come
            from the file that it has written.
        config: describes the model as it is.
        blocks_path: path of the list of blocks inside the model.
        records: one a block.
        blocks: one a block: where its tensors are.
        origins: one a block: the blocks (first, end) of the checkpoint that it stands for. Blocks
            that were dropped belong to the one in front of them, so that all are covered in order.
    """

    source: StoredTensors
    config: PreTrainedConfig
    blocks_path: str
    records: tuple[BlockRecord, ...]
    blocks: tuple[SourceBlock | Path, ...]
    origins: tuple[tuple[int, int], ...]
    trust_remote_code: bool = False

    @classmethod
    def of_checkpoint(
        cls, index: TensorIndex, config: PreTrainedConfig, trust_remote_code: bool = False
    ) -> ModelState:
        """The state before the first step (or a checkpoint that is to be looked at).

        Raises:
            CompressError: the tensors are not those of the architecture, or layers of it share
                weights.
        """
        check_layers(config, len(index))
        model = build_meta(config, trust_remote_code)
        anatomy = StreamedModel(model).anatomy
        check_own_weights(model, anatomy.prefix)
        widths = [block.widths for block in anatomy.blocks]
        records = [
            with_experts(record, model.get_submodule(block.path))
            for record, block in zip(
                read_records(config, anatomy.family, len(anatomy.blocks), widths), anatomy.blocks,
                strict=True,
            )
        ]  # fmt: skip
        tensors = ModelTensors(index, model, stored_names(model, anatomy, records))
        places = tuple(SourceBlock(b.path + ".") for b in anatomy.blocks)
        origins = tuple((i, i + 1) for i in range(len(places)))
        return cls(
            tensors, config, anatomy.blocks_path, tuple(records), places, origins, trust_remote_code
        )

    def check_outer(self) -> None:
        """Read what lies outside the blocks once, since no step looks at all of it.

        Raises:
            CompressError: NaN or infinite values, or two values of what config.json calls one.
        """
        self.source.check_ties()
        for name in self.outer():
            tensor = self.readable.get(name)
            if tensor.is_floating_point():
                check_finite(name, tensor, where=str(self.source.index.folder))

    def after(
        self,
        groups: Groups,
        records: Sequence[BlockRecord] | None = None,
        blocks: Sequence[SourceBlock | Path] | None = None,
        outer: Path | None = None,
        hidden: int = 0,
        embeddings: dict[str, QuantScheme] | None = None,
    ) -> ModelState:
        """The state after a pass that has changed blocks.

        Args:
            groups: the blocks of this state, by index, that each block of the result was made
                from, in order; a block in none of them was dropped.
            records: of the result's blocks; None where they are the first ones of their groups.
            blocks: where the result's blocks are; likewise.
            outer: file of the tensors outside the blocks, if they have changed.
            hidden: width of the residual stream, if it has changed.
            embeddings: what of ``outer`` is on a grid, if that has changed.
        """
        firsts, family = [group[0] for group in groups], family_of(self.config)
        if records is None:
            records = [self.records[i] for i in firsts]
        if blocks is None:
            blocks = [self.blocks[i] for i in firsts]
        config = self.config
        if firsts != list(range(len(self.blocks))):
            config = keep_layers(config, family, firsts, self.blocks_path, self.records)
        config = apply_records(config, family, records, self.blocks_path, hidden, embeddings)
        return replace(
            self,
            source=self.source if outer is None else self._changed_outside(outer),
            config=config,
            records=tuple(records),
            blocks=tuple(blocks),
            origins=tuple(merged_origins(self.origins, groups)),
        )

    def _changed_outside(self, file: Path) -> OuterTensors:
        return OuterTensors(self.source, file, self.blocks_path + ".")

    def outer(self) -> tuple[str, ...]:
        """Names of the tensors outside the blocks, as whoever computes has them."""
        prefix = self.blocks_path + "."
        return tuple(name for name in self.readable.names() if not name.startswith(prefix))

    @property
    def readable(self) -> Any:
        """The tensors with those of rounded embeddings unpacked."""
        schemes = read_embeddings(self.config)
        return UnpackedTensors(self.source, schemes) if schemes else self.source

    def streamed(self, device: torch.device | str = "cpu") -> StreamedModel:
        """Build the model on the meta device, ready to be filled block by block."""
        model = build_meta(self.config, self.trust_remote_code)
        return StreamedModel(model, self.readable, device)

    def load(self, index: int, block: nn.Module, anatomy: Anatomy) -> None:
        """Fill one block in float32.

        Raises:
            CompressError: NaN or infinite weights, or tensors that do not fit.
        """
        tensors = self._tensors(index)
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                check_finite(f"{anatomy.blocks[index].path}.{name}", tensor)
        load_block(block, tensors, self.records[index], torch.float32, anatomy.blocks[index])
        for path, pattern in self.records[index].zeros.items():
            block.get_submodule(path).zeros = pattern

    def _tensors(self, index: int) -> dict[str, torch.Tensor]:
        """One block's tensors; floating ones widened one by one, so that there is one copy."""
        place = self.blocks[index]
        if isinstance(place, SourceBlock):
            names = [n for n in self.source.names() if n.startswith(place.prefix)]
            return {n.removeprefix(place.prefix): _widened(self.source.get(n)) for n in names}
        with opened_block(place) as file:
            return {n: _widened(file.get_tensor(n)) for n in file.keys()}  # noqa: SIM118


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def streamed_logits(
    state: ModelState,
    batch: dict[str, torch.Tensor],
    scratch: Path,
    device: torch.device | str = "cpu",
    storage: Storage = FLOAT32,
) -> torch.Tensor:
    """Logits of one batch with one block in memory at a time, float32 on the CPU.

    Args:
        storage: what the model will be stored in; what is still in the source is rounded first.
    """
    from compress.system.activations import Activations

    state = replace(state, source=RoundedTensors(state.source, storage, state.blocks_path))
    source = state.streamed(device)
    if source.anatomy.family.shared_blocks:
        return _shared_logits(state, source, batch)
    entering = Activations(scratch / "probe.bin")
    batch = {k: v.to(source.device) for k, v in batch.items()}
    source.fill_outer()
    calls = capture_inputs(source.model, source.anatomy, [batch], entering, in_order=True)
    source.release_outer()
    hidden = entering.read(0).to(source.device)
    entering.remove()
    with torch.no_grad():
        for index in range(len(source.anatomy.blocks)):
            block = source.block(index)
            state.load(index, block, source.anatomy)
            block.to(source.device)
            hidden = calls[index][0](block, hidden)
            source.release_block(index)
    source.fill_outer()
    with torch.no_grad():
        return tail_logits(source.model, source.anatomy, batch, hidden).float().cpu()


def _shared_logits(
    state: ModelState, source: StreamedModel, batch: dict[str, torch.Tensor]
) -> torch.Tensor:
    """The same where a model applies its blocks more than once: it is small enough to be filled."""
    source.fill_outer()
    for index in range(len(source.anatomy.blocks)):
        block = source.block(index)
        state.load(index, block, source.anatomy)
        block.to(source.device)
    with torch.no_grad():
        inputs = {k: v.to(source.device) for k, v in batch.items()}
        return source.model(**inputs).logits.float().cpu()
