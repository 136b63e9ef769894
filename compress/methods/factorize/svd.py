"""SVD: the low-rank matrix next to the weight. Needs no data."""

from __future__ import annotations

from typing import ClassVar

from compress.methods.factorize.base import FactorizeMethod


class SVD(FactorizeMethod):
    """Truncate the singular value decomposition of each weight."""

    name: ClassVar[str] = "svd"
    summary: ClassVar[str] = "split each weight into two low-rank factors; no data needed"
    source: ClassVar[str] = "Eckart & Young 1936"
    needs: ClassVar[str] = "nothing"
