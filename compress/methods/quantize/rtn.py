"""Round to nearest, weight-only (RTN) and with dynamic int8 activations (W8A8). Needs no data."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from compress.linear.grid import QuantScheme
from compress.linear.matrix import is_linear
from compress.linear.statistics import NOTHING, RANGES
from compress.methods.base import CALIBRATION
from compress.methods.quantize.base import QuantizeMethod
from compress.methods.quantize.smoothing import foldable, smooth
from compress.methods.work import SiteWork
from compress.models.anatomy import QKV, UP, Site


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


class _Needs:
    """``nothing``, or the inputs where a step is told to smooth them."""

    def __get__(self, step: W8A8 | None, _class: type) -> str:
        return "nothing" if step is None or step.smoothing is None else CALIBRATION


class W8A8(RoundToNearest):
    """int8 weights (a scale a channel), int8 activations (a scale a token, found at run time)."""

    name: ClassVar[str] = "w8a8"
    summary: ClassVar[str] = "int8 weights and dynamic per-token int8 activations"
    source: ClassVar[str] = "Xiao et al. 2023, arXiv 2211.10438, sections 3 and 4"
    needs: ClassVar[Any] = _Needs()

    bits: Literal[8] = Field(8, description="Bits a weight; fixed.")
    group_size: None = Field(None, description="One scale an output channel; fixed.")
    symmetric: Literal[True] = Field(True, description="Symmetric grids; fixed.")
    embeddings: None = Field(None, description="Left as they are; fixed.")
    smoothing: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Move outliers of inputs into weights (SmoothQuant's alpha, usually 0.5): the "
        "gain of the norm in front takes it back, exactly. Needs calibration. null: not at all.",
    )

    @property
    def scheme(self) -> QuantScheme:
        return QuantScheme(bits=8, group_size=None, symmetric=True, activation_bits=8)

    def statistic(self, site: Site) -> str:
        return RANGES if self.smoothing is not None and site.kind in (QKV, UP) else NOTHING

    def solve(self, work: SiteWork) -> None:
        if self.smoothing is not None and foldable(work.anatomy, work.site):
            whole = set(work.names) == set(work.site.linears)
            if whole and all(is_linear(work.linear(name)) for name in work.names):
                work.metrics["smoothed"] = float(smooth(work, self.smoothing))
        super().solve(work)
