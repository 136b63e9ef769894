"""Embeddings and heads on a grid: in config.json, in files, and in a model that is loaded.

compressed-tensors cannot hold an embedding that a head is tied to, so such a checkpoint has a model
type of our own. ``compress.embeddings`` in its config.json gives the scheme of each such module;
its weight is stored as that of a quantised linear, with a guard under the name of the weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from compress.checkpoint.guards import SHAPE
from compress.checkpoint.packing import pack_codes, stored_shapes, unpack
from compress.checkpoint.serving import StoredLinear, leave_file
from compress.errors import CompressError
from compress.linear.bags import kernels
from compress.linear.grid import QuantScheme, dequantize
from compress.linear.packed import packing
from compress.linear.tables import PackedEmbedding, embedding_scale

_reading: ContextVar[bool] = ContextVar("reading", default=False)

Schemes = Mapping[str, QuantScheme]


def read_embeddings(config: PreTrainedConfig) -> dict[str, QuantScheme]:
    """Path in the model with its head -> scheme, as config.json says."""
    section = (getattr(config, "compress", None) or {}).get("embeddings", {})
    return {path: QuantScheme.model_validate(scheme) for path, scheme in section.items()}


def marked(model: nn.Module) -> dict[str, QuantScheme]:
    """The same of a model in memory in which a step has rounded them."""
    return {n: m.grid.scheme for n, m in model.named_modules() if getattr(m, "grid", None)}


def stored_outer(
    model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors outside the blocks as a checkpoint stores them, scales in ``dtype``.

    Raises:
        CompressError: what is rounded is an embedding of a class that could not be loaded.
    """
    for name, tensor in tensors:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        grid = getattr(module, "grid", None)
        if grid is None or leaf != "weight":
            yield name, tensor
            continue
        _check_class(module, owner)
        codes = grid.codes(tensor.detach())
        packed = pack_codes(codes, grid.scale, grid.zero_point, grid.scheme, dtype)
        yield from ((f"{owner}.{key}", packed[key]) for key in sorted(packed))
        yield name, torch.empty(SHAPE, dtype=dtype)


def stored_outer_shapes(
    shapes: Mapping[str, tuple[int, ...]], schemes: Schemes
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what is stored, from those of the model's state, guards left out."""
    found = {}
    for name, shape in shapes.items():
        owner, _, leaf = name.rpartition(".")
        if owner in schemes and leaf == "weight":
            packed = stored_shapes(schemes[owner], *shape)
            found |= {f"{owner}.{key}": own for key, own in packed.items()}
        else:
            found[name] = shape
    return found


class UnpackedTensors:
    """A checkpoint's tensors with those of rounded embeddings unpacked, for who computes."""

    def __init__(self, tensors: Any, schemes: Schemes) -> None:
        self._tensors, self._schemes = tensors, schemes

    def names(self) -> list[str]:
        kept = [name for name in self._tensors.names() if not self._packed(name)]
        return kept + [f"{owner}.weight" for owner in self._schemes]

    def get(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        if not self._packed(name):
            return self._tensors.get(name, dtype)
        owner = name.rpartition(".")[0]
        scheme = self._schemes[owner]
        shape = tuple(self._tensors.get(f"{owner}.weight_shape").tolist())
        names = stored_shapes(scheme, *shape)
        stored = {key: self._tensors.get(f"{owner}.{key}") for key in names}
        weight = dequantize(*unpack(stored, scheme, shape))
        return weight if dtype is None else weight.to(dtype)

    def _packed(self, name: str) -> bool:
        owner, _, leaf = name.rpartition(".")
        return owner in self._schemes and leaf.startswith("weight")


@contextmanager
def reading_embeddings() -> Iterator[None]:
    """Inside the block, models of own types are made to take in stored tensors."""
    token = _reading.set(True)
    try:
        yield
    finally:
        _reading.reset(token)


def place_embeddings(model: PreTrainedModel) -> None:
    """Inside :func:`reading_embeddings`, put modules that take in stored tensors in the place of
    what config.json says is rounded, and take its tied heads out.

    Raises:
        CompressError: what is rounded is an embedding of a class that computes more than a lookup
            and a scale.
    """
    schemes = _present(model) if _reading.get() else {}
    if not schemes:
        return
    replaced = {path: model.get_submodule(path) for path in schemes}
    for path, module in replaced.items():
        _check_class(module, path)
    names = {f"{path}.weight" for path in schemes}
    ties = {t: s for t, s in model.all_tied_weights_keys.items() if {t, s} & names}
    model.rounded = replaced, ties  # until settle_embeddings
    for name in ties:
        del model.all_tied_weights_keys[name]
        head = model.get_submodule(name.rpartition(".")[0])
        shape = head.weight.shape
        del head.weight
        head.weight = torch.empty(shape, device="meta")  # no parameter, for who asks for its shape
        head._is_hf_initialized = True
    for path, scheme in schemes.items():
        old = replaced[path]
        bias = getattr(old, "bias", None)
        model.set_submodule(path, StoredLinear(scheme, tuple(old.weight.shape), bias))


def settle_embeddings(model: PreTrainedModel) -> None:
    """Put in what computes from the tensors that were read: packed tables, or the modules of the
    class with their weights unpacked."""
    if "rounded" not in vars(model):
        return
    replaced, ties = vars(model).pop("rounded")
    keep = packing() and kernels(torch.device("cpu")) and model.device.type == "cpu"
    for path, old in replaced.items():
        stored = model.get_submodule(path)
        heads = [n.rpartition(".")[0] for n, source in ties.items() if source == f"{path}.weight"]
        if keep:
            table = stored.served(path)
            new = table
            if isinstance(old, nn.Embedding):
                new = PackedEmbedding(table, old, model.dtype).eval()
            model.set_submodule(path, new)
            for head in heads:
                model.set_submodule(head, table.shared(model.get_submodule(head).bias))
            continue
        weight = dequantize(*stored.grid(path)).to(model.dtype)
        old.weight = nn.Parameter(weight)
        if "embed_scale" in old._buffers:  # in no file, and on the meta device until now
            kept = {"dtype": old.embed_scale.dtype, "device": weight.device}
            old.embed_scale = torch.tensor(embedding_scale(old), **kept)
        if getattr(old, "bias", None) is not None:
            old.bias = stored.bias
        model.set_submodule(path, old)
        for head in map(model.get_submodule, heads):
            del head.weight
            head.weight = old.weight
    if keep:
        leave_file(model)
    else:
        model.all_tied_weights_keys.update(ties)
        model.config.compress = {**model.config.compress, "embeddings": {}}


def _check_class(module: nn.Module, path: str) -> None:
    """Refuse an embedding whose class computes more than a lookup and a scale."""
    if isinstance(module, nn.Embedding):
        try:
            embedding_scale(module)
        except CompressError as error:
            raise error.within(path) from None


def has_packed_embeddings(model: nn.Module) -> bool:
    """Whether a model that was loaded looks tokens up in packed tables."""
    return any(isinstance(module, PackedEmbedding) for module in model.modules())


def _present(model: PreTrainedModel) -> dict[str, QuantScheme]:
    """Those of config.json that this model has: a backbone by itself has shorter names."""
    prefix, found = model.base_model_prefix + ".", {}
    modules = dict(model.named_modules())
    for path, scheme in read_embeddings(model.config).items():
        name = path if path in modules else path.removeprefix(prefix)
        if name in modules:
            found[name] = scheme
    return found
