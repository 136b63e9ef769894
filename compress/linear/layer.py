"""What may stand in the place of a linear, and how it is described, built and taken apart.

A *layer* is a module that computes a linear map in some form of its own: two thin matrices, packed
blocks, a sum of a sparse and a low-rank part. The rest of the toolkit knows layers by this contract
only; anatomy, outlines, records, widths and checkpoints ask it and never ask for a class.

What a layer's ``state_dict`` holds is what its checkpoint holds: floating-point tensors in the
checkpoint's type, others as they are.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import BaseModel, ConfigDict, SerializeAsAny, ValidatorFunctionWrapHandler
from pydantic.functional_validators import WrapValidator
from torch import nn

from compress.errors import CompressError, did_you_mean
from compress.linear.matrix import features, is_linear, matrix
from compress.linear.statistics import InputStatistics

EXPERTS = "experts"  # kind of the spec of a module of experts that has been taken apart
CONVERTED = "linear"  # kind of the spec of an nn.Linear in the place of a GPT-2 Conv1D


class LayerSpec(BaseModel):
    """What a config says of a layer: its kind, and whatever its tensors' shapes do not tell."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: str


class Experts(LayerSpec):
    """Experts of a mixture are linears, not parameters of three dimensions.

    No layer of its own: it says what the linears inside are part of.

    Attributes:
        tensors: names of those parameters in the stock class.
        transposed: whether these hold matrices [in, out].
    """

    kind: str = EXPERTS
    tensors: tuple[str, ...]
    transposed: bool = False


class Converted(LayerSpec):
    """A GPT-2 ``Conv1D`` is an ``nn.Linear``."""

    kind: str = CONVERTED


@dataclass(frozen=True)
class LinearShape:
    """What a layer takes over from the module in whose place it is put."""

    out_features: int
    in_features: int
    bias: bool
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, module: nn.Module) -> LinearShape:
        """Read it off a linear or a layer."""
        like = next(p for p in module.parameters() if p.is_floating_point())
        rows, columns = features_of(module)
        return cls(rows, columns, module.bias is not None, like.device, like.dtype)


@dataclass(frozen=True)
class LayerSize:
    """What a layer weighs.

    Attributes:
        weights: stored numbers, biases left out.
        nonzero: of these, those that are not zero.
        macs: multiply-accumulates for one token.
        extra_bytes: what is stored beside these numbers and is none of them: indices, say.
    """

    weights: int
    nonzero: int
    macs: int
    extra_bytes: int = 0


class Layer(nn.Module):
    """Base of every module in the place of a linear map [in_features] -> [out_features].

    A subclass sets ``kind`` and ``Spec``, and has ``in_features``, ``out_features`` and ``bias``
    (a parameter [out_features] or None), as attributes or properties. None of its tensors may be
    called ``weight``: that name is what a class that does not know the layer would look for, and
    must not find.
    """

    kind: ClassVar[str]
    Spec: ClassVar[type[LayerSpec]] = LayerSpec

    in_features: int
    out_features: int
    bias: nn.Parameter | None
    serving: bool = False  # whether the weights are final, so that it may keep what it derives

    def forget(self) -> None:
        """Drop what was derived from weights that are about to change."""

    @abstractmethod
    def spec(self) -> LayerSpec:
        """The layer's description, from which :meth:`build` makes one like it."""

    @classmethod
    @abstractmethod
    def build(cls, spec: LayerSpec, like: LinearShape) -> Self:
        """A layer of this description and shape whose values do not matter yet."""

    @abstractmethod
    def dense(self) -> torch.Tensor:
        """The map as one matrix [out_features, in_features], a copy."""

    def parts(self) -> tuple[str, ...]:
        """Paths of the plain linears that the input passes one after the other.

        Sparsity and precision steps work on them, width steps narrow the first one's inputs and the
        last one's outputs. Empty: the layer cannot be taken apart, and such steps refuse it.
        """
        return ()

    def tables(self) -> tuple[str, ...]:
        """Paths of linears that hold numbers of a layer without parts; no input passes them.

        Precision steps round each by itself to nearest, and training reaches their weights. Other
        steps have no use for them.
        """
        return ()

    def size(self) -> LayerSize:
        """What it weighs; by default all its parameters but the bias, each used once a token."""
        weights = [p for p in self.parameters() if p is not self.bias]
        count = sum(p.numel() for p in weights)
        zeros = 0 if any(p.is_meta for p in weights) else sum(int((p == 0).sum()) for p in weights)
        return LayerSize(count, count - zeros, count)

    def execution(self) -> str:
        """Which products it runs, as a clause for a report; "" for those of dense matrices."""
        return ""

    def carried(self, statistics: InputStatistics, part: int) -> InputStatistics:
        """Statistics of the input of part number ``part``, from those of the layer's input."""
        for name in self.parts()[:part]:
            statistics = statistics.through(matrix(self.get_submodule(name)))
        return statistics


def is_map(module: nn.Module) -> bool:
    """Whether a module is a linear or a layer in the place of one."""
    return is_linear(module) or isinstance(module, Layer)


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a layer, of whatever kind."""
    return isinstance(module, Layer)


def features_of(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a linear or a layer."""
    if is_linear(module):
        return features(module)
    return module.out_features, module.in_features


def size_of(module: nn.Module) -> LayerSize:
    """What a linear or a layer weighs; zeros are not counted in modules without values."""
    if isinstance(module, Layer):
        return module.size()
    weight = matrix(module)
    nonzero = weight.numel() if weight.is_meta else int(weight.count_nonzero())
    return LayerSize(weight.numel(), nonzero, weight.numel())


def parts_of(module: nn.Module, path: str) -> list[str]:
    """Paths of the plain linears of the module at ``path``: itself, or a layer's parts."""
    if is_linear(module):
        return [path]
    return [f"{path}.{part}" for part in module.parts()]


def tables_of(module: nn.Module, path: str) -> list[str]:
    """Paths of the linears that hold the numbers of a layer at ``path`` which has no parts."""
    return [f"{path}.{table}" for table in module.tables()] if isinstance(module, Layer) else []


def serve(module: nn.Module) -> None:
    """Let all layers of a model keep what they derive from their weights."""
    for layer in module.modules():
        if isinstance(layer, Layer):
            layer.serving = True


@contextmanager
def at_work(module: nn.Module) -> Iterator[None]:
    """No layer of a model keeps what it derives meanwhile; those that did so before do again."""
    serving = [m for m in module.modules() if isinstance(m, Layer) and m.serving]
    for layer in serving:
        layer.serving = False
        layer.forget()
    try:
        yield
    finally:
        for layer in serving:
            layer.serving = True


def reading(module: nn.Module) -> nn.Module:
    """The linear that reads the input: the module itself, or a layer's first part."""
    return module if is_linear(module) else module.get_submodule(_parts(module)[0])


def writing(module: nn.Module) -> nn.Module:
    """The linear that writes the output: the module itself, or a layer's last part."""
    return module if is_linear(module) else module.get_submodule(_parts(module)[-1])


def product(module: nn.Module) -> torch.Tensor:
    """The map as one matrix [out, in]; a view for a plain linear, a copy for a layer."""
    return matrix(module) if is_linear(module) else module.dense()


def _parts(module: Layer) -> tuple[str, ...]:
    parts = module.parts()
    if not parts:
        raise CompressError(
            "linears, or layers made of linears",
            f"a layer of kind {module.kind}, which cannot be taken apart",
            "Exclude it from the step, or put the step before the one that made it",
        )
    return parts


_KINDS: dict[str, type[Layer] | str] = {
    "low_rank": "compress.linear.low_rank:LowRankLinear",
    "dense_sparse": "compress.linear.dense_sparse:DenseSparseLinear",
    "absent": "compress.linear.absent:AbsentLinear",
    "packed": "compress.linear.packed:PackedLinear",
    "int8": "compress.linear.int8:Int8Linear",
}
GROUP = "compress.layers"  # entry points of other packages, kind = "module:Class"


def register_layer(cls: type[Layer]) -> type[Layer]:
    """Make a kind of layer known in this process; usable as a decorator.

    A checkpoint that is to load in a process that has only imported this package needs the entry
    point ``compress.layers`` of an installed package instead.

    Raises:
        CompressError: another class has the kind.
    """
    known = _KINDS.get(cls.kind)
    if cls.kind == CONVERTED or known not in (None, cls, f"{cls.__module__}:{cls.__qualname__}"):
        raise CompressError(
            "a new kind of layer", f"{cls.kind!r}, which already stands for {known}",
            f"Give {cls.__qualname__} another kind",
        )  # fmt: skip
    _KINDS[cls.kind] = cls
    return cls


def layer_class(kind: str) -> type[Layer]:
    """The class of a kind of layer.

    Raises:
        CompressError: no such kind, or the package that has it fails.
    """
    if kind not in _KINDS:
        for point in importlib.metadata.entry_points(group=GROUP):
            _KINDS.setdefault(point.name, point.value)
    target = _KINDS.get(kind)
    if target is None:
        raise CompressError(
            "a known kind of layer", repr(kind),
            did_you_mean(kind, sorted(_KINDS)) or "Install the package that the checkpoint needs",
        )  # fmt: skip
    if isinstance(target, str):
        module, _, name = target.partition(":")
        try:
            target = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise CompressError(
                f"the class {target} of layers of kind {kind!r}", str(error),
                "Install the version of its package that the checkpoint was written with",
            ) from error  # fmt: skip
        _KINDS[kind] = target
    return target


def parse_spec(data: Any) -> LayerSpec:
    """The spec that plain data describe.

    Raises:
        CompressError: a kind that nobody knows.
        pydantic.ValidationError: other fields than the kind has.
    """
    if isinstance(data, LayerSpec):
        return data
    kind = data.get("kind") if isinstance(data, dict) else None
    if kind == CONVERTED:
        return Converted.model_validate(data)
    if kind == EXPERTS:
        return Experts.model_validate(data)
    if not isinstance(kind, str):
        raise CompressError("the kind of a layer", repr(kind))
    return layer_class(kind).Spec.model_validate(data)


def _by_kind(data: Any, _handler: ValidatorFunctionWrapHandler) -> LayerSpec:
    return parse_spec(data)


# A field of a pydantic model that holds the spec of any kind.
AnySpec = Annotated[SerializeAsAny[LayerSpec], WrapValidator(_by_kind)]
