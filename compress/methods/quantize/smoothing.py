"""Outliers of activations moved into weights: SmoothQuant's scales, folded into norms."""

from __future__ import annotations

import torch
from torch import nn

from compress.linear.matrix import matrix
from compress.methods.work import SiteWork
from compress.models.anatomy import OTHER, QKV, UP, BlockAnatomy, Site

_EXACT = 1e-4  # relative error of a norm with the scales in it, in float32
_LEAST = 1e-5


def foldable(block: BlockAnatomy, site: Site) -> bool:
    """Whether the inputs of a site are a norm's outputs that nothing else reads.

    That of a post-norm block is the residual stream as well, and then some producers read no norm
    of their block; where attention and FFN share one, so would the scales. The router and the
    routed experts of a mixture read what its shared experts read, though no norm is known of them:
    theirs is never folded, nor is the only norm of a block, which attention shares with them.
    """
    if (block.experts or block.site(OTHER) is not None) and (
        site.kind == UP or not _has_other_norm(block, site)
    ):
        return False
    readers = [s.norm for s in block.sites if s.kind in (QKV, UP)]
    if site.kind not in (QKV, UP) or None in readers:
        return False
    return readers.count(site.norm) == 1


def _has_other_norm(block: BlockAnatomy, site: Site) -> bool:
    """Whether a child of the block, beside the norm of a site, has a gain for each feature."""
    owners = {path.rpartition(".")[0] for path, shape in block.others if shape == (block.hidden,)}
    return any("." not in owner for owner in owners - {site.norm, ""})


@torch.no_grad()
def smooth(work: SiteWork, strength: float) -> bool:
    """Divide the inputs of a site by scales and multiply the columns of its linears with them.

    s_j = max|X_j|^a / max|W_j|^(1 - a) with a = ``strength`` (Xiao et al. 2023, equation 4), of
    geometric mean 1 and rounded to powers of two, by which floats of any type are multiplied and
    divided without an error. The norm's gain takes 1 / s.

    Returns:
        Whether it was done: not where the norm's gain is no factor of its output.
    """
    norm = work.block.get_submodule(work.site.norm or "")
    statistics = work.statistics[work.names[0]]
    weights = [work.weight(name) for name in work.names]
    inputs = torch.maximum(-statistics.least, statistics.largest).clamp_(min=_LEAST)
    columns = torch.stack([w.abs().amax(0) for w in weights]).amax(0).float().clamp_(min=_LEAST)
    scale = inputs.pow(strength) / columns.pow(1 - strength)
    scale = (scale.log2() - scale.log2().mean()).round().exp2()
    if not _divide(norm, scale):
        return False
    for name in work.names:
        matrix(work.linear(name)).mul_(scale)
    return True


def _divide(norm: nn.Module, scale: torch.Tensor) -> bool:
    """Make a norm's outputs smaller by ``scale`` [width]; undone where they do not become so.

    Most norms multiply by their weight, Gemma's by one more: which it is, is found by trying.
    """
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if weight is None:
        return False
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(4, len(scale), generator=generator).to(weight.device)
    before = norm(probe) / scale
    kept = [None if p is None else p.data.clone() for p in (weight, bias)]
    for unit in (0.0, 1.0):  # what the norm adds to its weight
        weight.data.copy_((kept[0] + unit) / scale - unit)
        if bias is not None:
            bias.data.copy_(kept[1] / scale)
        if (norm(probe) - before).abs().max() <= _EXACT * before.abs().max():
            return True
    for parameter, value in zip((weight, bias), kept, strict=True):
        if parameter is not None:
            parameter.data.copy_(value)
    return False
