"""Narrower FFNs: whole neurons go."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from compress.methods.width.base import WidthMethod
from compress.models.anatomy import DOWN


class FFNWidth(WidthMethod):
    """Remove neurons of the FFN: rows of up and gate, columns of the down projection."""

    name: ClassVar[str] = "ffn_width"
    summary: ClassVar[str] = "remove FFN neurons and refit the down projection to make up for them"
    source: ClassVar[str] = "Kurtic et al. 2023, ZipLM, arXiv 2302.04089, with one-shot scores"
    kind: ClassVar[str] = DOWN
    unit: ClassVar[str] = "neurons"

    round_to: int = Field(
        8, ge=1, description="Widths become multiples of this (8 or more suits matrix units)."
    )
