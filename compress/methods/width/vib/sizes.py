"""What a model weighs as a function of how many units it keeps: exact for whole numbers, and
differentiable for expected ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from compress.linear.matrix import features, is_linear
from compress.methods.base import HEADS, HIDDEN, NEURONS
from compress.methods.width.vib.gates import ATTENTION, FFN
from compress.models.anatomy import ATTENTION_OUT, DOWN, QKV, UP, Anatomy, BlockAnatomy
from compress.models.outline import BlockOutline, Outline

Counted = Literal["blocks", "model", "macs", "bytes"]
Counts = Mapping[str, torch.Tensor]  # kind -> float64 [blocks]; of the stream [1]


@dataclass(frozen=True)
class Sizes:
    """Coefficients of the size, a polynomial in the numbers of units, float64.

    With H channels, a block of A heads' groups and F neurons weighs

        a (A H pairs + A group + H joined) + f (F H pairs' + F neuron + H joined') + H norms + rest,

    a and f telling whether the sub-layers are there; what is outside H^2 square + H linear + fixed.

    Attributes:
        full: the numbers of units that there are.
        pairs, single, channel: [2, blocks], of attention and FFN.
        norms: [blocks].
        rest: [blocks], of what loses no unit, routed experts among it.
        outer: square, linear, fixed.
    """

    full: dict[str, torch.Tensor]
    pairs: torch.Tensor
    single: torch.Tensor
    channel: torch.Tensor
    norms: torch.Tensor
    rest: torch.Tensor
    outer: tuple[float, float, float]

    def amount(self, counts: Counts) -> torch.Tensor:
        """The size with so many units of each kind; of kinds that are left out, all."""
        found = {**self.full, **counts}
        hidden = found[HIDDEN]
        units = torch.stack([found[HEADS], found[NEURONS]])
        there = torch.stack([found[ATTENTION], found[FFN]])
        inside = there * (units * (hidden * self.pairs + self.single) + hidden * self.channel)
        square, linear, fixed = self.outer
        outside = square * hidden.square() + linear * hidden + fixed
        return inside.sum() + (hidden * self.norms + self.rest).sum() + outside.sum()

    def whole(self) -> float:
        """The size of the model as it is."""
        return float(self.amount({}))

    def of_one(self) -> dict[str, torch.Tensor]:
        """What one unit of each kind weighs, all others in place: kind -> [blocks]."""
        counts = {k: v.clone().requires_grad_(True) for k, v in self.full.items()}
        with torch.enable_grad():
            amount = self.amount(counts)
        found = torch.autograd.grad(amount, list(counts.values()))
        return dict(zip(counts, found, strict=True))


def sizes_of(
    outline: Outline,
    counted: Counted,
    value_bytes: float = 4.0,
    outer: tuple[float, float, float] | None = None,
) -> Sizes:
    """The size of a model's outline.

    Args:
        counted: parameters of the ``blocks`` or the whole ``model``, its ``bytes``, or the
            multiply-accumulates of linears and head for a token (``macs``), those of experts
            times the share of tokens that are sent to them.
        value_bytes: of a stored value.
        outer: of the parameters outside the blocks, from :func:`outer_terms`; by default all of
            them count as proportional to the width of the stream.
    """
    blocks = [_block_terms(block, counted) for block in outline.blocks]
    anatomies = [block.anatomy for block in outline.blocks]
    pairs, single, channel, norms, rest = (
        torch.tensor(values, dtype=torch.float64).movedim(0, -1)
        for values in zip(*blocks, strict=True)
    )
    hidden = outline.hidden_size
    if outer is None:
        outer = (0.0, outline.outer_parameters / hidden, 0.0)
    found = Sizes(_full(anatomies, hidden), pairs, single, channel, norms, rest, outer)
    if counted == "blocks":
        return replace(found, outer=(0.0, 0.0, 0.0))
    if counted == "bytes":
        scaled = {k: value_bytes * getattr(found, k)
                  for k in ("pairs", "single", "channel", "norms", "rest")}  # fmt: skip
        return replace(found, **scaled, outer=tuple(value_bytes * x for x in outer))
    if counted == "macs":
        return replace(
            found, single=0 * single, channel=0 * channel, norms=torch.zeros_like(norms),
            outer=(0.0, outline.head_weights / hidden, 0.0),
        )  # fmt: skip
    return found


def _full(anatomies: list[BlockAnatomy], hidden: int) -> dict[str, torch.Tensor]:
    def numbers(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)

    return {
        HIDDEN: numbers([hidden]),
        HEADS: numbers([a.kv_heads for a in anatomies]),
        NEURONS: numbers([a.ffn for a in anatomies]),
        ATTENTION: numbers([1] * len(anatomies)),
        FFN: numbers([1] * len(anatomies)),
    }


def _block_terms(block: BlockOutline, counted: Counted) -> tuple:
    """Pairs, single and channel of attention and FFN; norms and rest.

    The rest is in MACs for a token where these are counted, else in parameters.
    """
    anatomy, pairs, single, channel, biases = block.anatomy, [], [], [], 0
    for reads, writes, units in (
        (QKV, ATTENTION_OUT, anatomy.kv_heads), (UP, DOWN, anatomy.ffn),
    ):  # fmt: skip
        producers = [block.linears[n] for n in _names(anatomy, reads)]
        outputs = [block.linears[n] for n in _names(anatomy, writes)]
        units = units or 1
        rows = sum(x.out_features for x in producers)
        pairs.append((rows + sum(x.in_features for x in outputs)) / units)
        own = sum(x.out_features for x in producers if x.bias)
        single.append(own / units)
        channel.append(float(sum(x.bias for x in outputs)))
        biases += own + sum(x.out_features for x in outputs if x.bias)
    bound = {name for site in anatomy.sites for name in site.bound}
    names = {f"{name}.bias" for name in anatomy.linears}
    norms = sum(
        shape == (anatomy.hidden,)
        for name, shape in anatomy.others
        if name not in names and name.rpartition(".")[0] not in bound
    )
    gated = {n for kind in (QKV, ATTENTION_OUT, UP, DOWN) for n in _names(anatomy, kind)}
    others = [linear for name, linear in block.linears.items() if name not in gated]
    if counted == "macs":
        rest = sum(linear.macs for linear in others)
    else:
        rest = block.other_parameters - biases - norms * anatomy.hidden
        rest += sum(linear.weights for linear in others)
    return pairs, single, channel, float(norms), float(rest)


def _names(anatomy: BlockAnatomy, kind: str) -> tuple[str, ...]:
    site = anatomy.site(kind)
    return site.linears if site is not None else ()


def outer_terms(model: nn.Module, anatomy: Anatomy) -> tuple[float, float, float]:
    """Square, linear and fixed term of the parameters outside the blocks, by the width of the
    stream; what :func:`compress.models.hidden.narrow_outer` narrows, tied parameters once."""
    hidden = anatomy.blocks[0].hidden
    head, seen = model.get_output_embeddings(), set()
    square = linear = fixed = 0
    for name, module in model.named_modules():
        if not anatomy.is_outer(f"{name}."):
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            count, wide = parameter.numel(), 0
            if is_linear(module):
                rows, columns = features(module)
                written = rows == hidden and module is not head
                wide = written + (leaf == "weight" and columns == hidden)
            elif isinstance(module, nn.Embedding):
                wide = int(module.embedding_dim == hidden)
            elif not any(True for _ in module.children()):
                wide = int(parameter.shape == (hidden,))
            if wide == 2:
                square += count // hidden**2
            elif wide == 1:
                linear += count // hidden
            else:
                fixed += count
    return float(square), float(linear), float(fixed)
