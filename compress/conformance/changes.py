"""Which kinds of change a step made, found by comparing a model before and after it."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from compress.linear.matrix import is_linear, is_sparse
from compress.linear.quantized import quantized_parts, scheme_of
from compress.methods.base import DEPTH, MODULES, PRECISION, VALUES, WIDTH, ZEROS
from compress.models.anatomy import BlockAnatomy, anatomy_of


def changed_kinds(before: PreTrainedModel, after: PreTrainedModel) -> set[str]:
    """Out of values, zeros, width, depth, modules and precision, what differs in the blocks.

    Values are told apart only where shapes and modules have stayed: what a narrower or factorised
    block computes has other weights in any case.
    """
    old, new = _blocks(before), _blocks(after)
    if len(old) != len(new):
        left = [block.state_dict() for block, _ in old]
        moved = any(all(_differ(b.state_dict(), o) for o in left) for b, _ in new)
        known = [_widths(anatomy) for _, anatomy in old]
        wider = any(_widths(anatomy) not in known for _, anatomy in new)
        return {DEPTH} | ({VALUES} if moved else set()) | ({WIDTH} if wider else set())
    kinds: set[str] = set()
    for (first, anatomy), (second, narrowed) in zip(old, new, strict=True):
        if _widths(anatomy) != _widths(narrowed):
            kinds.add(WIDTH)
        for name in set(anatomy.linears) & set(narrowed.linears):  # experts may have gone
            kinds |= _of_linear(first.get_submodule(name), second.get_submodule(name))
        if not kinds & {WIDTH, MODULES, PRECISION} and _differ(
            _kept(first.state_dict(), second.state_dict()), second.state_dict()
        ):
            kinds.add(VALUES)
    return kinds


def changed_outside(before: PreTrainedModel, after: PreTrainedModel) -> list[str]:
    """Names of tensors outside the blocks that differ."""
    anatomy, old, new = anatomy_of(before), before.state_dict(), after.state_dict()
    return [
        name
        for name, tensor in old.items()
        if anatomy.is_outer(name) and (name not in new or not torch.equal(tensor, new[name]))
    ]


def _blocks(model: PreTrainedModel) -> list[tuple[nn.Module, BlockAnatomy]]:
    return [(model.get_submodule(block.path), block) for block in anatomy_of(model).blocks]


def _widths(anatomy: BlockAnatomy) -> dict[str, int]:
    return {**anatomy.widths, "hidden": anatomy.hidden}


def _of_linear(before: nn.Module, after: nn.Module) -> set[str]:
    kinds = set()
    quantized = quantized_parts(after)
    if quantized:
        kinds.add(PRECISION)
    elif is_linear(after) and is_sparse(after) and not is_sparse(before):
        kinds.add(ZEROS)
    # A quantised linear is one still; a pair of them is another module.
    same = scheme_of(after) is not None if quantized else isinstance(after, type(before))
    if not same:
        kinds.add(MODULES)
    return kinds


def _kept(
    before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors before, with zeros where there are zeros now: those are a kind of their own."""
    return {
        name: tensor.masked_fill(after[name] == 0, 0)
        for name, tensor in before.items()
        if name in after
    }


def _differ(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    return before.keys() != after.keys() or any(
        not torch.equal(tensor, after[name]) for name, tensor in before.items()
    )
