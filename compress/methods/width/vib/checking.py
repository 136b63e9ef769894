"""Which models gates can be put into: what is refused before any weight is read."""

from __future__ import annotations

import re

from compress.errors import CompressError
from compress.methods.base import HEADS, HIDDEN, NEURONS
from compress.methods.width.vib.gates import ATTENTION, FFN
from compress.methods.width.vib.options import VIBOptions
from compress.models.anatomy import ATTENTION_OUT, DOWN, QKV, UP, Anatomy, BlockAnatomy
from compress.models.outline import BlockOutline, Outline
from compress.models.units import units_of_rows
from compress.train.language import check_compared

_NORM = re.compile(r"norm|(^|_)ln", re.IGNORECASE)  # in the names of modules that are norms


def check_model(method: VIBOptions, anatomy: Anatomy, outline: Outline) -> None:
    """Refuse a model whose units cannot go one by one.

    Raises:
        CompressError: with the reason and the way out.
    """
    family = anatomy.family
    if family.shared_blocks:
        raise CompressError(
            "a model whose layers have weights of their own",
            f"{anatomy.model_type}, whose layers share one set",
            "Use a sparsity, precision or factorisation step",
        )
    if not outline.predicts:  # without trainings, too: the importance of units is its gradient
        raise CompressError(
            "a model with a head, from whose loss gates learn",
            f"a {anatomy.model_type} without one", "Load it with its head",
        )  # fmt: skip
    if HEADS in method.kinds and family.fixed_heads:
        raise CompressError(
            "a family whose layers may have different numbers of heads",
            f"{anatomy.model_type}, whose code takes it from one place for all",
            "Leave heads out of units",
        )
    check_compared(method.distillation, len(outline.blocks))
    for block in outline.blocks:
        _check_block(block, method, anatomy.model_type)
    if method.uniform and len({tuple(b.anatomy.widths.items()) for b in outline.blocks}) > 1:
        raise CompressError(
            "blocks of one width, to make them equally narrower", "blocks that differ already",
            "Set uniform: false",
        )  # fmt: skip


def _check_block(block: BlockOutline, method: VIBOptions, model_type: str) -> None:
    anatomy = block.anatomy
    wanted = {QKV, ATTENTION_OUT, UP, DOWN} if {ATTENTION, FFN, HIDDEN} & {*method.kinds} else set()
    wanted |= {QKV, ATTENTION_OUT} if HEADS in method.kinds else set()
    wanted |= {UP, DOWN} if NEURONS in method.kinds else set()
    missing = [kind for kind in sorted(wanted) if anatomy.site(kind) is None]
    if missing or (HIDDEN in method.kinds and not anatomy.hidden):
        raise CompressError(
            "blocks of attention and FFN that the toolkit recognises",
            f"none in {anatomy.path} ({model_type})",
            "`compress inspect` shows what was found; a family needs an entry in "
            "compress/models/families.py",
        )
    for units, kind in ((HEADS, ATTENTION_OUT), (NEURONS, DOWN)):
        if units in method.kinds:
            _check_units(block, kind, units, model_type)
    for name, linear in block.linears.items():
        if linear.quantized or linear.layer or linear.density < 1:
            raise CompressError(
                "plain linears without zeros or rounding of an earlier step",
                f"another in {anatomy.path}.{name}", f"Put {method.name} before that step",
            )  # fmt: skip
    if {ATTENTION, FFN} & {*method.kinds} and (norm := norm_behind(anatomy)):
        raise CompressError(
            "attention and FFN that are added to the residual stream as they are",
            f"{anatomy.path}.{norm} ({model_type}), a norm that neither of them reads: behind "
            "them it undoes what a gate multiplies by",
            "Leave layers out of units",
        )


def norm_behind(anatomy: BlockAnatomy) -> str | None:
    """Path inside a block of a norm between attention or FFN and the sum with the stream.

    With N(g x) = N(x) the loss does not depend on a gate g there: its gradient, and with it the
    importance of the sub-layer, is zero.

    Of the norms over the stream, the producers of attention and FFN read those in front of them
    and, in a post-norm block (BERT), that of the first sum, whereas that of the second one is read
    in the next block. What no linear reads beyond that is behind attention or FFN (Gemma 2, GLM-4).
    Where none is seen to be read, there is none in front (OLMo 2) or the class cannot run on shapes
    (ESM): then numbers and names must tell.
    """
    bound = {name for site in anatomy.sites for name in site.bound}
    own = {*anatomy.linears, *bound}
    norms = dict.fromkeys(
        module for name, shape in anatomy.others
        if shape == (anatomy.hidden,)
        and (module := name.rpartition(".")[0]) not in own
        and _NORM.search(module.rpartition(".")[2])
    )  # fmt: skip
    attention, ffn = (anatomy.site(kind).norm for kind in (QKV, UP))
    left = [name for name in norms if name not in (attention, ffn)]
    if attention is None and ffn is None:
        behind = len(left) > 2 or all("post" in name for name in left)
        return left[0] if left and behind else None
    post_norm = attention is None
    return left[0] if len(left) > post_norm else None


def _check_units(block: BlockOutline, kind: str, units: str, model_type: str) -> None:
    anatomy: BlockAnatomy = block.anatomy
    site = anatomy.site(kind)
    if site.bound:
        raise CompressError(
            f"{units} that can go one by one",
            f"{anatomy.path}.{site.bound[0]}, which joins all of them",
            f"Leave {units} out of units",
        )
    for name, rows in units_of_rows(anatomy, kind).items():
        if len(rows) != block.linears[name].out_features:
            raise CompressError(
                f"{len(rows)} outputs of {anatomy.path}.{name}",
                f"{block.linears[name].out_features}",
                f"Describe in compress/models/families.py how {model_type} fuses projections",
            )
