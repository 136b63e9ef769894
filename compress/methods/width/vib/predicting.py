"""What a model will weigh, before anything is decided: all kinds of units thinned out alike."""

from __future__ import annotations

from dataclasses import replace

import torch

from compress.methods.base import HEADS, HIDDEN, NEURONS
from compress.methods.width.vib.choosing import Chooser
from compress.methods.width.vib.sizes import Sizes
from compress.models.anatomy import ATTENTION_OUT, DOWN, QKV, UP
from compress.models.outline import BlockOutline, Outline


def thinned(outline: Outline, sizes: Sizes, target: float, plain: Chooser) -> Outline:
    """The outline of a model within a size.

    Args:
        plain: what will decide; its scores are not looked at.
    """
    full = sizes.full
    even: dict[str, list[torch.Tensor]] = {}
    for kind in (HIDDEN, HEADS, NEURONS):
        if kind in plain.scores:
            # The same share of every row lies below any threshold.
            even[kind] = [torch.arange(1, n + 1).double() / n for n in full[kind].int().tolist()]
    choice = replace(plain, scores=even, sizes=sizes, target=target).choose()
    left = {kind: [int(row.sum()) for row in rows] for kind, rows in choice.kept.items()}
    hidden = left.get(HIDDEN, [outline.hidden_size])[0]
    blocks = []
    for index, block in enumerate(outline.blocks):
        anatomy = block.anatomy
        widths = dict(anatomy.widths)
        if HEADS in left and anatomy.kv_heads:
            groups = left[HEADS][index]
            widths |= {"heads": anatomy.heads // anatomy.kv_heads * groups, "kv_heads": groups}
        if NEURONS in left:
            widths["ffn"] = left[NEURONS][index]
        blocks.append(_with_hidden(block.with_widths(widths), hidden))
    outer = outline.outer_parameters * hidden // outline.hidden_size
    return replace(
        outline, blocks=tuple(blocks), outer_parameters=outer, hidden_size=hidden,
        head_weights=outline.head_weights // outline.hidden_size * hidden,
    )  # fmt: skip


def _with_hidden(block: BlockOutline, hidden: int) -> BlockOutline:
    """The same block over a stream of another width."""
    anatomy = block.anatomy
    if hidden == anatomy.hidden or not anatomy.hidden:
        return block
    changed, lost = {}, 0
    for site in anatomy.sites:
        for name in site.linears:
            old = block.linears[name]
            if site.kind in (QKV, UP):
                changed[name] = old.narrowed(0, hidden)
            elif site.kind in (ATTENTION_OUT, DOWN):
                changed[name] = old.narrowed(hidden, 0)
                lost += old.bias * (anatomy.hidden - hidden)
    bound = {name for site in anatomy.sites for name in site.bound}
    own = {f"{n}.bias" for s in anatomy.sites if s.kind in (QKV, UP) for n in s.linears}
    others = []
    for name, shape in anatomy.others:
        wide = shape == (anatomy.hidden,) and name not in own
        if wide and name.rpartition(".")[0] not in bound:
            shape = (hidden,)
            lost += 0 if name.removesuffix(".bias") in changed else anatomy.hidden - hidden
        others.append((name, shape))
    return replace(
        block.with_linears(changed), other_parameters=block.other_parameters - lost,
        anatomy=replace(anatomy, hidden=hidden, others=tuple(others)),
    )  # fmt: skip
