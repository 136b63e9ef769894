"""Where tensors are: a checkpoint, under the names of the model's class, and files of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from compress.checkpoint.embeddings import read_embeddings, stored_outer_shapes
from compress.checkpoint.guards import is_guard
from compress.checkpoint.pieces import check_pieces, expert_pieces
from compress.checkpoint.records import BlockRecord, apply_record, stored_shapes_of
from compress.checkpoint.storage import Storage
from compress.errors import CompressError
from compress.models.agreement import check_shapes, check_ties
from compress.models.anatomy import Anatomy
from compress.models.leftovers import unused_weights
from compress.system.tensors import TensorIndex


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

        def renamed(name: str) -> str:
            for renaming in renamings if name not in wanted else ():
                name = renaming.rename_source_key(name)[0]
            return name

        self._pieces, used = expert_pieces(index, model, renamed, conversions)
        for stored in index.names():
            if stored in used:
                continue
            name = renamed(stored)
            if name not in wanted and prefix + name in wanted:
                self._stored[prefix + name] = stored
            elif name in wanted:
                self._stored[name] = stored
            elif not is_guard(name, index.shape(stored)):
                left.append(name)
        _check_unconverted(left, conversions, model)
        self.unused = unused_weights(model, left)
        missing = sorted(wanted - self._stored.keys() - self._pieces.keys() - tied)
        if missing:
            raise CompressError(
                f"a tensor for every parameter of {type(model).__name__}",
                f"none for {len(missing)} of them, {missing[0]} first",
                "The weights are of another architecture or in an older layout: load the model "
                "with transformers, save_pretrained it to a new folder, and use that",
            )
        check_shapes(self.index, self._stored, model)
        check_pieces(self.index, self._pieces, model)

    def check_ties(self) -> None:
        """See :func:`compress.models.agreement.check_ties`."""
        check_ties(self.index, self._stored, self._tied)

    def names(self) -> list[str]:
        return [*self._stored, *self._pieces]

    def get(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        if name in self._pieces:
            return self._pieces[name].get(self.index, dtype)
        return self.index.get(self._stored[name], dtype)

    def dtype(self, name: str) -> torch.dtype:
        if name in self._pieces:
            return self._pieces[name].dtype(self.index)
        return self.index.dtype(self._stored[name])

    def nbytes(self, name: str) -> int:
        if name in self._pieces:
            return self._pieces[name].nbytes(self.index)
        return self.index.nbytes(self._stored[name])

    @property
    def storage_dtype(self) -> torch.dtype:
        """The dtype that most floating bytes are stored in."""
        sizes: dict[torch.dtype, int] = {}
        for name in self.names():
            dtype = self.dtype(name)
            if dtype.is_floating_point:
                sizes[dtype] = sizes.get(dtype, 0) + self.nbytes(name)
        return max(sizes, key=sizes.get) if sizes else torch.float32


def stored_names(model: nn.Module, anatomy: Anatomy, records: Sequence[BlockRecord]) -> set[str]:
    """Return the names of the tensors that a model's checkpoint holds, tied ones included.

    Makes the blocks of ``model`` (on the meta device) what the records say.
    """
    state = {n: tuple(t.shape) for n, t in model.state_dict().items() if anatomy.is_outer(n)}
    names = set(stored_outer_shapes(state, read_embeddings(model.config)))
    for block, record in zip(anatomy.blocks, records, strict=True):
        module = model.get_submodule(block.path)
        apply_record(module, record)
        names |= {f"{block.path}.{name}" for name in stored_shapes_of(module, record)}
    return names


class OuterTensors:
    """A checkpoint's tensors, of which those outside the blocks come from a file of a run.

    Args:
        tensors: of the checkpoint.
        path: of the file.
        prefix: of the names of tensors in blocks.
    """

    def __init__(self, tensors: StoredTensors, path: Path, prefix: str) -> None:
        self._tensors, self._path, self._prefix = tensors, path, prefix
        with opened_block(path) as file:
            self._outer = frozenset(file.keys())
        self.index, self.unused = tensors.index, tensors.unused
        self.storage_dtype = tensors.storage_dtype

    def names(self) -> list[str]:
        inside = [name for name in self._tensors.names() if name.startswith(self._prefix)]
        return [*sorted(self._outer), *inside]

    def get(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        if name not in self._outer:
            return self._tensors.get(name, dtype)
        with opened_block(self._path) as file:
            tensor = file.get_tensor(name)
        return tensor if dtype is None else tensor.to(dtype)

    def check_ties(self) -> None:
        """The checkpoint's were looked at; those of the file were written from tied parameters."""


StoredTensors = ModelTensors | OuterTensors


class RoundedTensors:
    """A checkpoint's tensors as they will be written: floating ones rounded as ``storage`` says.

    Args:
        blocks_path: path of the list of blocks inside the model.
    """

    def __init__(self, tensors: StoredTensors, storage: Storage, blocks_path: str) -> None:
        self._tensors, self._storage, self._prefix = tensors, storage, blocks_path + "."

    def names(self) -> list[str]:
        return self._tensors.names()

    def get(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        tensor = self._tensors.get(name)
        if name.startswith(self._prefix):
            within = name.removeprefix(self._prefix).partition(".")[2]
            tensor = self._storage.in_block(within, tensor)
        else:
            tensor = self._storage.outside(name, tensor)
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
