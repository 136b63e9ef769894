"""Taking out what gates have decided on, their means folded into the weights beside them."""

from __future__ import annotations

import torch
from torch import nn

from compress.linear.absent import AbsentLinear
from compress.linear.layer import features_of
from compress.linear.matrix import is_linear, matrix
from compress.methods.base import HEADS, HIDDEN, NEURONS
from compress.methods.width.vib.choosing import Choice
from compress.methods.width.vib.gates import ATTENTION, FFN, Gates
from compress.methods.width.vib.placing import outer_writers
from compress.models.anatomy import ATTENTION_OUT, DOWN, QKV, UP, Anatomy, BlockAnatomy
from compress.models.hidden import narrow_block, narrow_outer
from compress.models.units import keep_units, unit_columns

Learned = dict[str, torch.Tensor]

_KEPT, _MEAN = ".kept", ".mean"  # beside a kind: bool and float32 [units]
_SITES = ((ATTENTION_OUT, QKV, HEADS, ATTENTION), (DOWN, UP, NEURONS, FFN))


def learned_of_block(gates: Gates, choice: Choice, index: int) -> Learned:
    """What a block has to know to be narrowed."""
    found: Learned = {}
    for kind, gate in gates.kinds.items():
        place = 0 if kind == HIDDEN else index
        found[kind + _KEPT] = choice.kept[kind][place].clone()
        found[kind + _MEAN] = gate.of(gate.mean.detach(), place).cpu().clone()
    return found


def narrow(block: nn.Module, anatomy: BlockAnatomy, learned: Learned) -> dict[str, float]:
    """Narrow a live block; returns how many heads, neurons and channels it has left (0: none).

    A sub-layer that goes leaves linears without weights, which return zeros.
    """
    gone, figures = [], {}
    for site, producers, units, whole in _SITES:
        found = anatomy.site(site)
        if found is None:
            continue
        output = block.get_submodule(found.linears[0])
        if units + _MEAN in learned:
            size = unit_columns(anatomy, site).shape[1]
            matrix(output).mul_(learned[units + _MEAN].to(output.weight).repeat_interleave(size))
        if whole + _MEAN in learned:
            _scale_rows(output, learned[whole + _MEAN].to(output.weight))
        if HIDDEN + _MEAN in learned:
            _scale_rows(output, learned[HIDDEN + _MEAN].to(output.weight))
        left = len(unit_columns(anatomy, site))
        if units + _KEPT in learned:
            kept = learned[units + _KEPT].nonzero().flatten()
            left = len(kept)
            if left < len(learned[units + _KEPT]):
                keep_units(block, anatomy, site, kept)
        if whole + _KEPT in learned and not bool(learned[whole + _KEPT]):
            gone += [*anatomy.site(producers).linears, found.linears[0]]
            left = 0
        figures[units] = float(left)
    if HIDDEN + _KEPT in learned:
        channels = learned[HIDDEN + _KEPT].nonzero().flatten()
        if len(channels) < anatomy.hidden:
            narrow_block(block, anatomy, channels)
        figures[HIDDEN] = float(len(channels))
    for name in gone:
        rows, columns = features_of(block.get_submodule(name))
        block.set_submodule(name, AbsentLinear(columns, rows))
    return figures


def _scale_rows(linear: nn.Module, factor: torch.Tensor) -> None:
    """Multiply what a linear returns by one factor or one an output."""
    matrix(linear).mul_(factor[:, None])
    if linear.bias is not None:
        linear.bias.data.mul_(factor)


def narrow_outside(model: nn.Module, anatomy: Anatomy, learned: Learned) -> None:
    """Narrow the stream outside the blocks; a head tied to an embedding gets its means too."""
    mean, seen = learned[HIDDEN + _MEAN], set()
    for module in outer_writers(model, anatomy):
        if id(module.weight) in seen:
            continue
        seen.add(id(module.weight))
        factor = mean.to(module.weight)
        if is_linear(module):
            _scale_rows(module, factor)
        else:
            module.weight.data.mul_(factor)
    kept = learned[HIDDEN + _KEPT].nonzero().flatten()
    if len(kept) < len(mean):
        narrow_outer(model, anatomy, kept)
