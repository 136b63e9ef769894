"""A step tried on a miniature of a model whose family nobody has described.

The table of families says which sizes an attention module keeps, how projections are fused, which
config field means what; the conformance suite vouches for that. For any other model type those
things are inferred, and whether they hold is tried before a plan accepts a step that changes the
architecture: a model of the same class with random weights and a few thousand parameters is changed
the way the step will do it, described in a config, built anew from that config, filled and asked.
Its logits must be those of a model in which the lost parts are zeros. That takes a fraction of a
second, and finds heads that need each other (differential attention), widths that a class rounds,
sizes that the forward pass reads from somewhere else, layers that are told apart by their number,
and linears whose class reads weights that a packed checkpoint does not have.
"""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from compress.checkpoint.config import apply_records, keep_layers
from compress.checkpoint.fewer_layers import cut_layers
from compress.checkpoint.records import record_block
from compress.checkpoint.save import save_model
from compress.errors import CompressError
from compress.linear.grid import QuantScheme, find_group_qparams
from compress.linear.layer import Layer
from compress.linear.matrix import as_linear, features, is_linear, matrix
from compress.linear.packed import packed_weights
from compress.linear.quantized import QuantizedLinear
from compress.methods.base import DEPTH, EXPERTS, HEADS, HIDDEN, MODULES, NEURONS, PRECISION
from compress.models.anatomy import (
    ATTENTION_OUT,
    DOWN,
    Anatomy,
    BlockAnatomy,
    anatomy_of,
    stock_type,
)
from compress.models.experts import fuse_all, unfuse_all
from compress.models.families import FAMILIES
from compress.models.groups import set_blocks
from compress.models.hidden import narrow_block, narrow_outer
from compress.models.mixtures import follow_experts, keep_experts
from compress.models.units import narrow_columns, narrow_rows, unit_columns, units_of_rows
from compress.models.widths import set_width_attributes
from compress.planning.miniature import build, logits_of, miniature

_TOLERANCE = 1e-4


def rehearse(what: str, config: PreTrainedConfig, layer: int = 1) -> None:
    """Try a change of the architecture on a miniature of the config's model.

    Does nothing for families of the table, whose widths, depth, modules and precision the
    conformance suite vouches for; the residual stream is tried with every family.

    Args:
        what: ``heads``, ``neurons``, ``hidden``, ``experts``, ``depth``, ``modules`` or
            ``precision``.
        layer: for ``depth``, the one that goes.

    Raises:
        CompressError: the family does not take the change, or it cannot be tried and would not show
            in the proof of the result.
    """
    kind = stock_type(config)
    if kind in FAMILIES and what != HIDDEN:
        return
    if what == "modules" and kind not in CONFIG_MAPPING_NAMES:
        raise CompressError(
            "a model type that transformers has, to derive one with new modules from",
            f"{kind!r}, whose code comes with the checkpoint",
            "Use a sparsity, width, depth or precision step",
        )
    model = miniature(config)
    if model is None or len(anatomy_of(model).blocks) < 2:
        if what in (HEADS, NEURONS, HIDDEN):
            raise _refused(what, kind, "no miniature of it can be built to try that on")
        return  # the result is proved in any case
    try:
        difference = _try(what, model, layer)
    except CompressError as error:
        raise _refused(what, kind, f"on a miniature: {error}", layer) from error
    except Exception as error:  # a class that does not fit its weights raises whatever it hits
        why = f"{type(error).__name__} on a miniature: {error}"
        raise _refused(what, kind, why, layer) from error
    if not difference <= _TOLERANCE:
        raise _refused(
            what, kind, f"a relative error of {difference:.1e} on a miniature, where {what} depend "
            "on one another or on their number"
            if what != HIDDEN
            else f"a relative error of {difference:.1e} on a miniature, where what is computed "
            "depends on the width",
            layer,
        )  # fmt: skip


def rehearse_method(method: Any, model: PreTrainedModel) -> None:
    """Rehearse what a method (its instance) does to a model's architecture, if anything."""
    config = copy.copy(model.config)
    config.architectures = config.architectures or [type(model).__name__]
    for width in sorted(method.narrowing()):
        rehearse(width, config)
    if DEPTH in method.writes:
        rehearse("depth", config)
        _rehearse_trials(method, model, config)
    if MODULES in method.makes():
        rehearse("modules", config)
    if PRECISION in method.writes:
        rehearse("precision", config)


def _rehearse_trials(method: Any, model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Try whether the config can tell what is left without the blocks that a method may take.

    With all layers, unlike a miniature: further back some may be of another build.
    """
    anatomy = anatomy_of(model)
    trials = getattr(method, "trials", None)  # a method outside the toolkit may have none
    if trials is None or anatomy.model_type in FAMILIES:
        return
    removals = trials(anatomy)
    for gone in removals:
        kept = [block.index for block in anatomy.blocks if block.index not in gone]
        if kept:
            cut_layers(config, anatomy.family, kept)
    if any(0 in gone for gone in removals):
        rehearse("depth", config, layer=0)


def _refused(what: str, kind: str, why: str, layer: int = 1) -> CompressError:
    change = {
        "modules": "linears that two factors can replace", "depth": "layers that can go",
        HIDDEN: "a residual stream that can be narrower",
        "precision": "linears that load from a packed checkpoint",
    }  # fmt: skip
    if layer == 0:
        change["depth"] = "a first layer that can go"
    other = "sparsity" if what == "precision" else "sparsity or precision"
    fix = "Leave it in (protect_first)" if layer == 0 else f"Use a {other} step"
    known = kind in FAMILIES
    return CompressError(
        change.get(what, f"{what} that can go one by one"),
        f"{kind}{'' if known else ', a family outside compress/models/families.py'}: {why}",
        fix + ("" if known else ", or describe the family (model.family)"),
    )


def _try(what: str, model: PreTrainedModel, layer: int) -> float:
    """Change the model; return how far a rebuilt one is from what it should compute."""
    anatomy = anatomy_of(model)
    if what == "depth":
        return _difference(_without(layer, model, anatomy), logits_of(model))
    if what == "precision":
        return _difference(_packed(model, anatomy), logits_of(model))
    if what == EXPERTS:
        return _difference(_with_fewer_experts(model, anatomy), logits_of(model))
    if what == HIDDEN:
        return _difference(_with_a_narrow_stream(model, anatomy), logits_of(model))
    if what == "modules":
        expected = _factorise(model, anatomy)
    else:
        expected = _narrow(model, anatomy, ATTENTION_OUT if what == HEADS else DOWN)
    live = _difference(logits_of(model), expected)
    after = anatomy_of(model)
    records = [record_block(model.get_submodule(b.path), b) for b in after.blocks]
    config = apply_records(model.config, anatomy.family, records, anatomy.blocks_path)
    return max(live, _difference(_rebuilt(config, model.state_dict()), expected))


@torch.no_grad()
def _packed(model: PreTrainedModel, anatomy: Anatomy) -> torch.Tensor:
    """Round the linears of a live model, save it; return the logits of what loads from there."""
    scheme = QuantScheme(bits=8, group_size=None, symmetric=True)
    for block in anatomy.blocks:
        module = model.get_submodule(block.path)
        for name in block.linears:
            linear = as_linear(module.get_submodule(name))
            grid = find_group_qparams(linear.weight, scheme, torch.float32)
            module.set_submodule(name, QuantizedLinear.from_linear(linear, scheme, *grid))
    with tempfile.TemporaryDirectory(prefix="compress-rehearsal-") as folder:
        save_model(model, folder)
        # Its own class, not an auto class: code of a checkpoint is not in this folder. And as stock
        # transformers read it: what only our packed linears can load, they would misread.
        with packed_weights(False):
            return logits_of(type(model).from_pretrained(folder).eval())


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def _rebuilt(config: PreTrainedConfig, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of a model that is built from a config as a reader would, by way of its JSON."""
    again = type(config).from_dict(config.to_dict())
    model = build(again)
    model.load_state_dict(state)
    return logits_of(model)


@torch.no_grad()
def _narrow(model: PreTrainedModel, anatomy: Anatomy, kind: str) -> torch.Tensor:
    """Take one unit out of every block, more of the second; return the logits with zeros instead.

    The second block differs, so that both ways of saying widths are tried by turns.
    """
    chosen = [b for b in anatomy.blocks if b.site(kind) is not None]
    lost = {block.index: _lost(block, kind, number) for number, block in enumerate(chosen)}
    whole = {}
    for block in chosen:
        linear = _output(model, block, kind)
        weight = matrix(linear)
        whole[block.index] = weight.clone()
        weight[:, unit_columns(block, kind)[lost[block.index]].reshape(-1)] = 0
    expected = logits_of(model)
    for block in chosen:
        matrix(_output(model, block, kind)).copy_(whole[block.index])
        module = model.get_submodule(block.path)
        units = unit_columns(block, kind)
        stay = torch.tensor([i for i in range(len(units)) if i not in lost[block.index]])
        for name, owners in units_of_rows(block, kind).items():
            narrow_rows(module.get_submodule(name), torch.isin(owners, stay).nonzero().flatten())
        narrow_columns(_output(model, block, kind), units[stay].reshape(-1))
        widths = {**block.widths}
        if kind == DOWN:
            widths["ffn"] = len(stay)
        else:
            widths["heads"] = block.heads // block.kv_heads * len(stay)
            widths["kv_heads"] = len(stay)
        set_width_attributes(module, block, widths)
    return expected


def _lost(block: BlockAnatomy, kind: str, number: int) -> list[int]:
    """Which units of a block go: at the front or the end, one or (of neurons) some more."""
    count = len(unit_columns(block, kind))
    few = count // 4 if kind == DOWN else 1
    return list(range(few)) if number % 2 else list(range(count - few, count))


def _output(model: PreTrainedModel, block: BlockAnatomy, kind: str) -> nn.Module:
    return model.get_submodule(f"{block.path}.{block.site(kind).linears[0]}")


@torch.no_grad()
def _factorise(model: PreTrainedModel, anatomy: Anatomy) -> torch.Tensor:
    """Replace the linears of a block by low-rank pairs; return the logits of their products."""
    from compress.methods.factorize.base import low_rank

    block = anatomy.blocks[1]
    module = model.get_submodule(block.path)
    pairs: dict[str, Layer] = {}
    for name in block.linears:
        linear = module.get_submodule(name)
        out_features, in_features = features(linear)
        # Also thin ones: Mamba reads the weight of one that has two inputs here.
        rank = min(out_features, in_features) // 2
        if not is_linear(linear) or rank == 0:
            continue
        basis = torch.linalg.svd(matrix(linear), full_matrices=False)[0][:, :rank].double()
        pairs[name] = low_rank(linear, basis)
        matrix(linear).copy_(pairs[name].dense())
    expected = logits_of(model)
    for name, pair in pairs.items():
        module.set_submodule(name, pair)
    return expected


@torch.no_grad()
def _with_a_narrow_stream(model: PreTrainedModel, anatomy: Anatomy) -> torch.Tensor:
    """Take channels out of a live model's residual stream; return the logits of one rebuilt so."""
    hidden = anatomy.blocks[0].hidden
    kept = torch.arange(hidden)[torch.arange(hidden) % 4 != 1]
    for block in anatomy.blocks:
        narrow_block(model.get_submodule(block.path), block, kept)
    narrow_outer(model, anatomy, kept)
    after = anatomy_of(model)
    records = [record_block(model.get_submodule(b.path), b) for b in after.blocks]
    config = apply_records(
        model.config, anatomy.family, records, anatomy.blocks_path, after.blocks[0].hidden
    )
    return _rebuilt(config, model.state_dict())


@torch.no_grad()
def _with_fewer_experts(model: PreTrainedModel, anatomy: Anatomy) -> torch.Tensor:
    """Take an expert out of every mixture of a live model; return the logits of one rebuilt so."""
    unfuse_all(model)
    for block in anatomy.blocks:
        if block.mixture is not None:
            kept = [number for number in range(block.experts) if number != 1]
            keep_experts(model.get_submodule(block.path), block.mixture, kept)
    after = anatomy_of(model)
    follow_experts(model, *(max(b.experts for b in a.blocks) for a in (anatomy, after)))
    records = [record_block(model.get_submodule(b.path), b) for b in after.blocks]
    config = apply_records(model.config, anatomy.family, records, anatomy.blocks_path)
    fuse_all(model)
    return _rebuilt(config, model.state_dict())


def _without(layer: int, model: PreTrainedModel, anatomy: Anatomy) -> torch.Tensor:
    """Take a layer out of a live model; return the logits of one rebuilt without it."""
    kept = [b.index for b in anatomy.blocks if b.index != layer]
    config = keep_layers(model.config, anatomy.family, kept, anatomy.blocks_path)
    blocks = [model.get_submodule(anatomy.blocks[i].path) for i in kept]
    set_blocks(model, anatomy.blocks_path, blocks)
    model.config.__dict__.clear()
    model.config.__dict__.update(copy.deepcopy(config).__dict__)
    return _rebuilt(config, model.state_dict())
