"""Round to nearest, weight-only (RTN) and with dynamic int8 activations (W8A8). Needs no data."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from compress.linear.grid import QuantScheme
from compress.methods.quantize.base import QuantizeMethod
from compress.methods.work import SiteWork


class RoundToNearest(QuantizeMethod):
    """Round every weight to the nearest value of its group's grid."""

    name: ClassVar[str] = "rtn"
    summary: ClassVar[str] = "round weights to 2-8 bits, nearest value; no data needed"
    source: ClassVar[str] = "the baseline of Frantar et al. 2023, arXiv 2210.17323"
    needs: ClassVar[str] = "nothing"

    def solve(self, work: SiteWork) -> None:
        for paths, _ in work.groups():
            for path in paths:
                scale, zero_point = self.fit(work.weight(path), work)
                self.install(work, path, scale, zero_point)
        self.round_tables(work)


class W8A8(RoundToNearest):
    """int8 weights (a scale a channel), int8 activations (a scale a token, found at run time)."""

    name: ClassVar[str] = "w8a8"
    summary: ClassVar[str] = "int8 weights and dynamic per-token int8 activations"
    source: ClassVar[str] = "Xiao et al. 2023, arXiv 2211.10438, section 3 (without smoothing)"

    bits: Literal[8] = Field(8, description="Bits a weight; fixed.")
    group_size: None = Field(None, description="One scale an output channel; fixed.")
    symmetric: Literal[True] = Field(True, description="Symmetric grids; fixed.")
    embeddings: None = Field(None, description="Left as they are; fixed.")

    @property
    def scheme(self) -> QuantScheme:
        return QuantScheme(bits=8, group_size=None, symmetric=True, activation_bits=8)
