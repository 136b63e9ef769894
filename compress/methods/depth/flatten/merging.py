"""Neighbouring blocks side by side, in one of the sum of their widths."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from compress.errors import CompressError
from compress.linear.matrix import matrix, set_matrix
from compress.methods.depth.flatten.folding import fold_norms
from compress.methods.work import GroupWork
from compress.models.anatomy import QKV, UP, BlockAnatomy, Site
from compress.models.families import CONCATENATED
from compress.models.widths import set_width_attributes

_EXACT = 1e-3  # relative error of a block whose norms have been folded


def flatten_blocks(work: GroupWork) -> nn.Module:
    """Fold the norms of the blocks and put them side by side; returns the first, now that block.

    With N(.) the norm without scale it computes h' = h + sum_i A_i(N h), then h' + sum_i F_i(N h'),
    for attentions A_i and FFNs F_i of all blocks.

    Raises:
        CompressError: a block computes something else once its norms are folded: its class uses
            them for more than the linears that read them.
    """
    for position, block in enumerate(work.blocks):
        _fold(work, position, block)
    first, anatomy = work.blocks[0], work.anatomies[0]
    for site in anatomy.sites:
        for name in site.linears:
            _concatenate([b.get_submodule(name) for b in work.blocks], anatomy, site)
    count = len(work.blocks)
    set_width_attributes(first, anatomy, {k: count * v for k, v in anatomy.widths.items()})
    return first


def _fold(work: GroupWork, position: int, block: nn.Module) -> None:
    anatomy = work.anatomies[position]
    if any(getattr(block.get_submodule(name), "zeros", None) for name in anatomy.linears):
        raise CompressError(
            "linears without zeros of an earlier step", f"some in {anatomy.path}",
            "Put the sparsity step behind this one",
        )  # fmt: skip
    run: Callable[[], torch.Tensor] | None = None
    if work.inputs is not None:
        probe = work.inputs.read(0).to(work.device)
        run = lambda: work.calls[position][0](block, probe)  # noqa: E731
    before = run() if run else None
    fold_norms(block, anatomy)
    if run is None or before is None:
        return
    after, size = run(), before.abs().max()
    error = float((after - before).abs().max() / size) if size > 0 else 0.0
    if not error <= _EXACT:
        raise CompressError(
            f"a block whose norms serve its linears alone in {anatomy.path}",
            f"one that computes something else without their scales (relative error {error:.1e})",
            "Use shortgpt or sleb, which leave blocks as they are",
        )


def _concatenate(linears: list[nn.Module], anatomy: BlockAnatomy, site: Site) -> None:
    """Make the first linear that of all: more outputs where it reads the stream, more inputs (and
    the sum of the biases) where it writes to it."""
    target, weights = linears[0], [matrix(linear) for linear in linears]
    biases = [linear.bias for linear in linears]
    if site.kind in (QKV, UP):
        sections = row_sections(anatomy, site)
        set_matrix(target, _interleaved(weights, sections))
        if target.bias is not None:
            bias = _interleaved([b.data for b in biases], sections)
            target.bias = nn.Parameter(bias, requires_grad=target.bias.requires_grad)
        return
    set_matrix(target, torch.cat(weights, 1))
    for bias in biases[1:] if target.bias is not None else ():
        target.bias.data += bias.data


def row_sections(anatomy: BlockAnatomy, site: Site) -> list[int]:
    """Numbers of rows of the parts that a producer's rows are made of: [q | k | v], [gate | up]
    where they are one linear, else all rows."""
    family = anatomy.family
    heads, kv_heads = (n * anatomy.head_dim for n in (anatomy.heads, anatomy.kv_heads))
    if site.kind == QKV and family.qkv_layout == CONCATENATED:
        return [heads, kv_heads, kv_heads]
    if site.kind == UP and family.up_layout == CONCATENATED:
        return [anatomy.ffn, anatomy.ffn]
    return []


def _interleaved(tensors: list[torch.Tensor], sections: list[int]) -> torch.Tensor:
    """All first sections of the tensors, then all second ones; without sections one by one."""
    if not sections:
        return torch.cat(tensors)
    parts = zip(*(tensor.split(sections) for tensor in tensors), strict=True)
    return torch.cat([part for section in parts for part in section])
