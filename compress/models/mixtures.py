"""Mixtures of experts as a whole: where experts and router of a block are, and how experts are
taken out together with what the router holds of them.

The tensors of a router have a row for each expert, whatever else a family puts beside its weight
(GPT-OSS a bias, DeepSeek-V3 a correction of the scores). What a class is called or how it scores
makes no difference here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from compress.models.experts import UnfusedExperts, is_fused, tensors_of

_ROUTERS = ("gate", "router")  # names beside the experts, in transformers' classes
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "out_features")
_GROUPS = ("num_group", "n_group")


@dataclass(frozen=True)
class Mixture:
    """The routed experts of one block; shared ones, which every token passes, are none of them.

    Attributes:
        experts: path in the block of the module that holds them.
        router: path in the block of what chooses among them.
        row: parameters that the router holds of each expert, beside those of linears.
        groups: sets of experts that the router chooses from one after the other.
    """

    experts: str
    router: str
    row: int
    groups: int


def mixture_in(block: nn.Module) -> tuple[Mixture, int] | None:
    """The mixture of a block, real or meta, and its number of experts.

    None where a block has none, several, or one without a router beside it.
    """
    found = [
        (n, m) for n, m in block.named_modules() if isinstance(m, UnfusedExperts) or is_fused(m)
    ]
    if len(found) != 1:
        return None
    path, experts = found[0]
    parent = path.rpartition(".")[0]
    beside = dict(block.get_submodule(parent).named_children())
    name = next((name for name in _ROUTERS if name in beside), None)
    if name is None:
        return None
    router = beside[name]
    groups = next((getattr(router, field) for field in _GROUPS if hasattr(router, field)), 1)
    count, row = expert_count(experts), 0
    for module in (block.get_submodule(parent), *router.modules()):
        if not isinstance(module, nn.Linear):
            row += sum(p.numel() // count for p in _held(module._parameters, count).values())
    return Mixture(path, f"{parent}.{name}".lstrip("."), row, groups or 1), count


def expert_count(module: nn.Module) -> int:
    """Number of experts of a module that holds them, taken apart or not."""
    if isinstance(module, UnfusedExperts):
        return sum(name.isdigit() for name, _ in module.named_children())
    return len(module._parameters[tensors_of(module)[1]])


def keep_experts(block: nn.Module, mixture: Mixture, kept: Sequence[int]) -> None:
    """Take all but some experts out of a block, and out of its router. They are numbered anew.

    Args:
        block: real or meta; its experts have been taken apart.
        kept: numbers of those that stay, ascending.
    """
    experts = block.get_submodule(mixture.experts)
    count = expert_count(experts)
    staying = [experts._modules[str(number)] for number in kept]
    for number in range(count):
        del experts._modules[str(number)]
    for number, expert in enumerate(staying):
        experts.add_module(str(number), expert)
    parent = block.get_submodule(mixture.router.rpartition(".")[0])
    router = list(block.get_submodule(mixture.router).modules())
    for module in router:
        _keep_rows(module, count, kept)
    _keep_rows(parent, count, kept)
    for module in (experts, parent, *router):
        for field in _COUNTS:
            if vars(module).get(field) == count:
                setattr(module, field, len(kept))


def _keep_rows(module: nn.Module, count: int, kept: Sequence[int]) -> None:
    """Of the module's own tensors that have a row for each expert, keep those rows."""
    for held in (module._parameters, module._buffers):
        for name, tensor in _held(held, count).items():
            rows = tensor.detach()[torch.tensor(kept, device=tensor.device)].contiguous()
            if isinstance(tensor, nn.Parameter):
                rows = nn.Parameter(rows, requires_grad=tensor.requires_grad)
            held[name] = rows


def _held(tensors: dict[str, torch.Tensor | None], count: int) -> dict[str, torch.Tensor]:
    """Those with a row for each of so many experts."""
    return {n: t for n, t in tensors.items() if t is not None and t.shape[:1] == (count,)}


def follow_experts(model: nn.Module, before: int, after: int) -> None:
    """Let a live model's head know how many experts there are (its balancing loss counts them)."""
    for field in _COUNTS[:-1]:
        if before != after and vars(model).get(field) == before:
            setattr(model, field, after)
