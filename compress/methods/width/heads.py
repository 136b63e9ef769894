"""Fewer attention heads: a key/value head goes together with the query heads that read it."""

from __future__ import annotations

from typing import ClassVar

from compress.errors import CompressError
from compress.methods.width.base import WidthMethod
from compress.models.anatomy import ATTENTION_OUT, Anatomy
from compress.models.outline import Outline


class HeadWidth(WidthMethod):
    """Remove groups of heads: rows of query, key and value, columns of the output projection.

    Without grouped queries a group is one head.
    """

    name: ClassVar[str] = "head_width"
    summary: ClassVar[str] = "remove heads (whole KV groups) and refit the output projection"
    source: ClassVar[str] = "Kurtic et al. 2023, ZipLM, arXiv 2302.04089, with one-shot scores"
    kind: ClassVar[str] = ATTENTION_OUT
    unit: ClassVar[str] = "KV groups"

    def check(self, anatomy: Anatomy, outline: Outline) -> None:
        if anatomy.family.fixed_heads:
            raise CompressError(
                "a family whose layers may have different numbers of heads",
                f"{anatomy.model_type}, whose code takes it from one place for all",
                "Use ffn_width or another kind of step",
            )
        super().check(anatomy, outline)
