"""One block as stored tensors plus a record of how it differs from the config's, and back."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from transformers import PreTrainedConfig

from compress.checkpoint.packing import check_names, check_shape, pack, stored_shapes, unpack
from compress.errors import CompressError
from compress.linear.grid import QuantScheme
from compress.linear.layer import (
    CONVERTED,
    EXPERTS,
    AnySpec,
    Converted,
    Experts,
    LayerSpec,
    LinearShape,
    is_layer,
    layer_class,
    parse_spec,
)
from compress.linear.matrix import features, is_conv1d, is_linear
from compress.linear.quantized import QuantizedLinear, scheme_of
from compress.models.anatomy import BlockAnatomy
from compress.models.experts import UnfusedExperts, fused, tensors_of, unfuse, unfused_in
from compress.models.widths import resize_block


class BlockRecord(BaseModel):
    """How one block is built and stored; everything that its tensors alone do not say.

    Attributes:
        widths: heads, kv_heads and ffn of the block as it is (0 where it has no such part).
        modules: path in the block -> the new module there.
        quantization: path of a quantised linear -> its scheme.
        zeros: path of a linear -> "N:M" or "unstructured", as a sparsity step noted it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    widths: dict[str, int] = Field(default_factory=dict)
    modules: dict[str, AnySpec] = Field(default_factory=dict)
    quantization: dict[str, QuantScheme] = Field(default_factory=dict)
    zeros: dict[str, str] = Field(default_factory=dict)


def module_specs(config: PreTrainedConfig, num_blocks: int) -> list[dict[str, LayerSpec]]:
    """Return {path: spec} of the new modules of every block."""
    specs: list[dict[str, LayerSpec]] = [{} for _ in range(num_blocks)]
    for name, spec in (getattr(config, "compressed_modules", None) or {}).items():
        index, _, path = name.partition(".")
        specs[int(index)][path] = parse_spec(spec)
    return specs


def record_block(block: nn.Module, anatomy: BlockAnatomy) -> BlockRecord:
    """Read the record off a block's modules.

    Args:
        anatomy: of the block as it is now.

    Raises:
        CompressError: a layer with a tensor called ``weight``.
    """
    modules: dict[str, LayerSpec] = {}
    quantization: dict[str, QuantScheme] = {}
    zeros: dict[str, str] = {}
    for name, module in block.named_modules():
        if is_layer(module):
            if "weight" in module.state_dict():
                raise CompressError(
                    "a layer without a tensor of the name `weight`, which a class that does not "
                    "know the layer would load", f"{type(module).__name__} at {name}",
                    "Give the tensor another name",
                )  # fmt: skip
            modules[name] = module.spec()
        elif isinstance(module, UnfusedExperts):
            modules[name] = experts_spec(module)
        elif getattr(module, "was_conv1d", False):
            modules[name] = Converted()
        if (scheme := scheme_of(module)) is not None:
            quantization[name] = scheme
        if is_linear(module) and getattr(module, "zeros", None):
            zeros[name] = module.zeros
    return BlockRecord(
        widths=anatomy.widths, modules=modules, quantization=quantization, zeros=zeros
    )


def experts_spec(module: UnfusedExperts) -> Experts:
    """What a config says of experts that have been taken apart."""
    return Experts(tensors=tensors_of(module), transposed=module.is_transposed)


def with_experts(record: BlockRecord, block: nn.Module) -> BlockRecord:
    """The record of a block that says which of its modules are experts taken apart."""
    found = {path: experts_spec(module) for path, module in unfused_in(block)}
    if not found.keys() - record.modules.keys():
        return record
    return record.model_copy(update={"modules": {**found, **record.modules}})


def without_experts(record: BlockRecord) -> BlockRecord:
    """The record of a block as a checkpoint has it whose experts are in one tensor again."""
    kept = {path: spec for path, spec in record.modules.items() if spec.kind != EXPERTS}
    return record.model_copy(update={"modules": kept})


def needs_own_experts(records: Sequence[BlockRecord]) -> bool:
    """Whether experts of any block are no plain linears, so that the stock class has no place for
    them; other new modules take a class of ours in any case."""
    for record in records:
        inside = tuple(f"{p}." for p, spec in record.modules.items() if spec.kind == EXPERTS)
        if any(path.startswith(inside) for path in (*record.modules, *record.quantization)):
            return True
    return any(spec.kind != EXPERTS for record in records for spec in record.modules.values())


def joined_experts(
    tensors: Iterable[tuple[str, torch.Tensor]], record: BlockRecord
) -> Iterator[tuple[str, torch.Tensor]]:
    """A block's tensors with its experts' in the parameters of the stock class."""
    specs = {f"{p}.": spec for p, spec in record.modules.items() if isinstance(spec, Experts)}
    held: dict[str, dict[str, torch.Tensor]] = {prefix: {} for prefix in specs}
    for name, tensor in tensors:
        prefix = next((p for p in specs if name.startswith(p)), None)
        rest = name.removeprefix(prefix or "")
        if prefix is not None and rest.partition(".")[0].isdigit():
            held[prefix][rest] = tensor
        else:
            yield name, tensor
    for prefix, found in held.items():
        spec = specs[prefix]
        for name, tensor in fused(found, spec.tensors, spec.transposed).items():
            yield prefix + name, tensor


def dump_block(
    block: nn.Module,
    anatomy: BlockAnatomy,
    dtype: torch.dtype,
    wide: Container[str] = (),
) -> tuple[dict[str, torch.Tensor], BlockRecord]:
    """Return a block's tensors in storage form, names relative to the block, and its record.

    Args:
        anatomy: of the block as it is now.
        dtype: of floating tensors in the file, scales included.
        wide: names of tensors that are stored in float32 all the same.

    Returns:
        Contiguous tensors in a stable order; those already in ``dtype`` share the block's memory.
    """
    record = record_block(block, anatomy)
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in block.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if owner in record.quantization and leaf.startswith("weight"):
            if leaf == "weight":
                packed = pack(block.get_submodule(owner), dtype)
                stored.update((f"{owner}.{key}", packed[key]) for key in sorted(packed))
            continue
        if tensor.is_floating_point():
            tensor = tensor.to(torch.float32 if name in wide else dtype)
        stored[name] = tensor.detach().contiguous()
    return stored, record


def load_block(
    block: nn.Module,
    tensors: dict[str, torch.Tensor],
    record: BlockRecord,
    dtype: torch.dtype = torch.float32,
    anatomy: BlockAnatomy | None = None,
) -> None:
    """Fill a block from its stored tensors: the inverse of :func:`dump_block`.

    The block's modules, widths included, are made what the record says; parameters are assigned,
    so that a block on the meta device comes to life.

    Args:
        block: as its class builds it from the config (meta or real).
        tensors: names relative to the block.
        dtype: of floating parameters in memory.
        anatomy: of ``block`` as it is before this call; needed where the record's widths are not
            those that the block was built with.

    Raises:
        CompressError: a tensor is missing, unexpected or of another shape than the block's.
    """
    apply_record(block, record, anatomy)
    loose = dict(tensors)
    for owner, scheme in record.quantization.items():
        prefix = f"{owner}.weight"
        packed = {
            n.removeprefix(f"{owner}."): t for n, t in tensors.items() if n.startswith(prefix)
        }
        loose = {n: t for n, t in loose.items() if not n.startswith(prefix)}
        module = block.get_submodule(owner).to(dtype)
        try:
            grid = unpack(packed, scheme, (module.out_features, module.in_features))
        except CompressError as error:
            raise error.within(owner) from None
        module.set_codes(*grid)
    _assign(block, loose, set(record.quantization), dtype)


def stored_shapes_of(block: nn.Module, record: BlockRecord) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the tensors that :func:`dump_block` makes, without making them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in block.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if owner not in record.quantization or not leaf.startswith("weight"):
            shapes[name] = tuple(tensor.shape)
        elif leaf == "weight":
            packed = stored_shapes(record.quantization[owner], *tensor.shape)
            shapes.update((f"{owner}.{key}", shape) for key, shape in packed.items())
    return shapes


def apply_record(
    block: nn.Module, record: BlockRecord, anatomy: BlockAnatomy | None = None
) -> None:
    """Make a block's modules what the record says, without values.

    A block that already is what the record says stays as it is; see :func:`load_block`.
    """
    if anatomy is not None and record.widths and anatomy.widths != record.widths:
        resize_block(block, anatomy, record.widths)
    for path, spec in record.modules.items():
        _replace(block, path, spec)
    for path, scheme in record.quantization.items():
        old = block.get_submodule(path)
        if scheme_of(old) == scheme:
            continue
        new = QuantizedLinear(
            old.in_features,
            old.out_features,
            scheme,
            bias=old.bias is not None,
            device=old.weight.device,
            dtype=old.weight.dtype,
        )
        new.was_conv1d = getattr(old, "was_conv1d", False)
        block.set_submodule(path, new.train(old.training))
    for path, pattern in record.zeros.items():
        block.get_submodule(path).zeros = pattern


def _replace(block: nn.Module, path: str, spec: LayerSpec) -> None:
    old = block.get_submodule(path)
    if is_layer(old) and old.spec() == spec:
        return
    if spec.kind == EXPERTS:
        unfuse(old)
        return
    if spec.kind != CONVERTED:
        new: nn.Module = layer_class(spec.kind).build(spec, LinearShape.of(old))
    elif is_conv1d(old):
        out_features, in_features = features(old)
        new = nn.Linear(in_features, out_features, device=old.weight.device, dtype=old.weight.dtype)
        new.was_conv1d = True
    else:
        old.was_conv1d = True
        return
    block.set_submodule(path, new.train(old.training))


def _assign(
    block: nn.Module, tensors: dict[str, torch.Tensor], quantized: set[str], dtype: torch.dtype
) -> None:
    """Assign every parameter and persistent buffer that is not part of a packed weight."""
    expected = {
        name: tensor
        for name, tensor in block.state_dict().items()
        if not (
            name.rpartition(".")[0] in quantized and name.rpartition(".")[2].startswith("weight")
        )
    }
    check_names(set(tensors), set(expected))
    for name, tensor in tensors.items():
        check_shape(name, tensor, tuple(expected[name].shape))
        if tensor.is_floating_point():
            tensor = tensor.to(dtype)
        owner, _, leaf = name.rpartition(".")
        module = block.get_submodule(owner)
        if leaf in module._parameters:
            grad = module._parameters[leaf].requires_grad and tensor.is_floating_point()
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=grad)
        else:
            module._buffers[leaf] = tensor
