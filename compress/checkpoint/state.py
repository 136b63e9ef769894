"""A model between two steps: its config, what each block is, and which file holds it.

Finished blocks are small safetensors files, tensors named relative to the block and already in the
form of the final checkpoint. Nothing is copied that did not change: blocks that no step has touched
stay in the source checkpoint, and dropping a block is dropping an entry of a list.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedConfig

from compress.checkpoint.config import apply_records, keep_layers, read_records
from compress.checkpoint.guards import is_guard
from compress.checkpoint.records import BlockRecord, apply_record, load_block, stored_shapes_of
from compress.errors import CompressError
from compress.models.agreement import check_shapes, check_ties
from compress.models.anatomy import Anatomy, family_of
from compress.models.config_limits import check_layers
from compress.models.leftovers import unused_weights
from compress.models.stream import StreamedModel, build_meta, capture_inputs, tail_logits
from compress.system.tensors import TensorIndex, check_finite


@dataclass(frozen=True)
class SourceBlock:
    """A block that is still where it came from."""

    prefix: str  # path of the block in the source, with a final dot


@dataclass(frozen=True)
class ModelState:
    """A model as it is between two steps.

    Attributes:
        source: the checkpoint the run started from; outer tensors always come from it.
        config: describes the model as it is.
        blocks_path: path of the list of blocks inside the model.
        records: one a block.
        blocks: one a block: where its tensors are.
    """

    source: ModelTensors
    config: PreTrainedConfig
    blocks_path: str
    records: tuple[BlockRecord, ...]
    blocks: tuple[SourceBlock | Path, ...]
    trust_remote_code: bool = False

    @classmethod
    def of_checkpoint(
        cls, index: TensorIndex, config: PreTrainedConfig, trust_remote_code: bool = False
    ) -> ModelState:
        """The state before the first step (or a checkpoint that is to be looked at).

        Raises:
            CompressError: the tensors are not those of the architecture.
        """
        check_layers(config, len(index))
        model = build_meta(config, trust_remote_code)
        anatomy = StreamedModel(model).anatomy
        widths = [block.widths for block in anatomy.blocks]
        records = read_records(config, anatomy.family, len(anatomy.blocks), widths)
        tensors = ModelTensors(index, model, stored_names(model, anatomy, records))
        places = tuple(SourceBlock(b.path + ".") for b in anatomy.blocks)
        return cls(tensors, config, anatomy.blocks_path, tuple(records), places, trust_remote_code)

    def check_outer(self) -> None:
        """Read what lies outside the blocks once, since no step looks at all of it.

        Raises:
            CompressError: NaN or infinite values, or two values of what config.json calls one.
        """
        self.source.check_ties()
        for name in self.source.names():
            if not name.startswith(self.blocks_path + "."):
                tensor = self.source.get(name)
                if tensor.is_floating_point():
                    check_finite(name, tensor, where=str(self.source.index.folder))

    def changed(self, records: list[BlockRecord], files: list[Path]) -> ModelState:
        """The state after a step that rewrote every block."""
        config = apply_records(self.config, family_of(self.config), records, self.blocks_path)
        return replace(self, config=config, records=tuple(records), blocks=tuple(files))

    def kept(self, indices: list[int]) -> ModelState:
        """The state after a step that kept only some blocks."""
        family = family_of(self.config)
        records = [self.records[i] for i in indices]
        config = keep_layers(self.config, family, indices, self.blocks_path, self.records)
        config = apply_records(config, family, records, self.blocks_path)
        blocks = tuple(self.blocks[i] for i in indices)
        return replace(self, config=config, records=tuple(records), blocks=blocks)

    def streamed(self, device: torch.device | str = "cpu") -> StreamedModel:
        """Build the model on the meta device, ready to be filled block by block."""
        return StreamedModel(build_meta(self.config, self.trust_remote_code), self.source, device)

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


class ModelTensors:
    """A checkpoint's tensors under the names that the model's class gives them.

    Older checkpoints leave out the base model's prefix (GPT-2) and carry buffers that classes now
    compute (attention masks, rotary frequencies), and some families are stored under other names;
    transformers mends that while loading, and so must anything that reads tensors one by one.

    Args:
        wanted: names that the checkpoint has to hold, tied tensors included.

    Attributes:
        unused: stored tensors of no part of the model (another head, a pooler), left out.

    Raises:
        CompressError: a parameter has no tensor, or one of another shape or kind; or a tensor of a
            part that the model has (a bias of its layers, one layer more) has no parameter.
    """

    def __init__(self, index: TensorIndex, model: nn.Module, wanted: set[str]) -> None:
        self.index = index
        self._tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
        tied = set(self._tied)
        prefix = model.base_model_prefix + "."
        self._stored = {}
        left = []
        renamings, conversions = _transforms(model)
        for stored in index.names():
            name = stored
            for renaming in renamings if name not in wanted else ():
                name = renaming.rename_source_key(name)[0]
            if name not in wanted and prefix + name in wanted:
                self._stored[prefix + name] = stored
            elif name in wanted:
                self._stored[name] = stored
            elif not is_guard(name, index.shape(stored)):
                left.append(name)
        _check_unconverted(left, conversions, model)
        self.unused = unused_weights(model, left)
        missing = sorted(wanted - self._stored.keys() - tied)
        if missing:
            raise CompressError(
                f"a tensor for every parameter of {type(model).__name__}",
                f"none for {len(missing)} of them, {missing[0]} first",
                "The weights are of another architecture or in an older layout: load the model "
                "with transformers, save_pretrained it to a new folder, and use that",
            )
        check_shapes(self.index, self._stored, model)

    def check_ties(self) -> None:
        """See :func:`compress.models.agreement.check_ties`."""
        check_ties(self.index, self._stored, self._tied)

    def names(self) -> list[str]:
        return list(self._stored)

    def get(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.index.get(self._stored[name], dtype)

    def dtype(self, name: str) -> torch.dtype:
        return self.index.dtype(self._stored[name])

    def nbytes(self, name: str) -> int:
        return self.index.nbytes(self._stored[name])

    @property
    def storage_dtype(self) -> torch.dtype:
        """The dtype that most floating bytes are stored in."""
        sizes: dict[torch.dtype, int] = {}
        for name in self._stored:
            dtype = self.dtype(name)
            if dtype.is_floating_point:
                sizes[dtype] = sizes.get(dtype, 0) + self.nbytes(name)
        return max(sizes, key=sizes.get) if sizes else torch.float32


def stored_names(model: nn.Module, anatomy: Anatomy, records: Sequence[BlockRecord]) -> set[str]:
    """Return the names of the tensors that a model's checkpoint holds, tied ones included.

    Makes the blocks of ``model`` (on the meta device) what the records say.
    """
    names = {name for name in model.state_dict() if anatomy.is_outer(name)}
    for block, record in zip(anatomy.blocks, records, strict=True):
        module = model.get_submodule(block.path)
        apply_record(module, record)
        names |= {f"{block.path}.{name}" for name in stored_shapes_of(module, record)}
    return names


class RoundedTensors:
    """A checkpoint's tensors as they will be written: floating ones rounded to ``storage``."""

    def __init__(self, tensors: ModelTensors, storage: torch.dtype) -> None:
        self._tensors, self._storage = tensors, storage

    def names(self) -> list[str]:
        return self._tensors.names()

    def get(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        tensor = self._tensors.get(name)
        if tensor.is_floating_point():
            tensor = tensor.to(self._storage)
        return tensor if dtype is None else tensor.to(dtype)


def _transforms(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """How transformers renames tensors of this model as it loads them (BERT's ``gamma``,
    GPT-NeoX's ``embed_out``), and which it makes others of (Mixtral's experts, merged)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    mapping = get_model_conversion_mapping(model)
    renamings = [step for step in mapping if isinstance(step, WeightRenaming)]
    return renamings, [step for step in mapping if not isinstance(step, WeightRenaming)]


def _check_unconverted(names: list[str], conversions: list[Any], model: nn.Module) -> None:
    """Refuse tensors that are no parameters as they are stored: blocks are read one by one."""
    converted = [n for n in names if any(c.rename_source_key(n)[1] for c in conversions)]
    if converted:
        raise CompressError(
            "a checkpoint that stores each parameter as one tensor",
            f"{len(converted)} tensors ({converted[0]} first) that transformers merges or splits "
            f"to make the parameters of {type(model).__name__}",
            "Load the model in Python, then use compress.apply and compress.save",
        )


@contextmanager
def opened_block(path: Path) -> Iterator[Any]:
    """A small file of a run, open to read tensors one at a time.

    Raises:
        CompressError: the file is gone or damaged.
    """
    try:
        with safe_open(path, framework="pt", backend="pread") as file:
            yield file
    except (FileNotFoundError, SafetensorError) as error:
        raise CompressError(
            f"the finished block in {path}", str(error),
            "Something has removed or changed it; the same command makes it again",
        ) from error  # fmt: skip


def read_block(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a small file of a run."""
    with opened_block(path) as file:
        return {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def streamed_logits(
    state: ModelState,
    batch: dict[str, torch.Tensor],
    scratch: Path,
    device: torch.device | str = "cpu",
    storage: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Logits of one batch with one block in memory at a time, float32 on the CPU.

    Args:
        storage: dtype that the model will be stored in; what is still in the source is rounded to
            it first.
    """
    from compress.system.activations import Activations

    state = replace(state, source=RoundedTensors(state.source, storage))
    source = state.streamed(device)
    if source.anatomy.family.shared_blocks:
        return _shared_logits(state, source, batch)
    entering = Activations(scratch / "probe.bin")
    batch = {k: v.to(source.device) for k, v in batch.items()}
    source.fill_outer()
    calls = capture_inputs(source.model, source.anatomy, [batch], entering)
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
