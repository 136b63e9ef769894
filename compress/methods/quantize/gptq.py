"""GPTQ: round column by column and let the columns to come make up for the error."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from compress.linear.algebra import inverse_cholesky
from compress.linear.grid import QuantScheme
from compress.linear.matrix import is_sparse
from compress.linear.statistics import GRAM
from compress.linear.sweep import sweep, sweep_bytes, sweep_work
from compress.methods.quantize.base import QuantizeMethod
from compress.methods.work import SiteWork
from compress.models.anatomy import Site


class GPTQ(QuantizeMethod):
    """Second-order quantisation of weights.

    Groups are static: their scales are fitted to the weights before the sweep when ``actorder`` is
    on (so a file needs no permutation), and to the weights as updated on entering the group when it
    is off. Weights that an earlier step has zeroed stay zero.
    """

    name: ClassVar[str] = "gptq"
    summary: ClassVar[str] = "round weights to 2-8 bits with second-order error feedback"
    source: ClassVar[str] = "Frantar et al. 2023, arXiv 2210.17323, Algorithm 1"

    actorder: bool = Field(
        True, description="Visit columns by descending activation energy (diag of the Hessian)."
    )
    damping: float = Field(
        0.01, gt=0, description="Share of the mean of the Hessian's diagonal added to it."
    )
    block_size: int = Field(
        128, gt=0, description="Columns between two updates of the rest; speed only."
    )

    @property
    def scheme(self) -> QuantScheme:
        return super().scheme.model_copy(update={"actorder": self.actorder})

    def statistic(self, site: Site) -> str:
        return GRAM

    def solving_bytes(self, shapes: list[tuple[int, int]], gram: bool) -> int:
        return sweep_bytes(shapes, copies=6)

    def solving_work(self, shapes: list[tuple[int, int]]) -> float:
        return sweep_work(shapes)

    def solve(self, work: SiteWork) -> None:
        for paths, statistics in work.groups():
            gram = statistics.gram
            order = None
            if self.actorder:
                order = gram.diagonal().argsort(descending=True, stable=True)
                gram = gram[order][:, order]
            upper, _ = inverse_cholesky(gram, self.damping, work.label(paths[0]))
            weights = [work.weight(path) for path in paths]
            weight = torch.cat(weights)
            keep = torch.cat([self._kept(work, p, w) for p, w in zip(paths, weights, strict=True)])
            # A whole channel is fitted beforehand in any case: no column precedes it.
            fitted = self.fit(weight, work) if self.actorder or not self.group_size else None
            if order is not None:
                weight, keep = weight[:, order], keep[:, order]
            rounding = _Grid(self, work, weight.shape, keep, fitted, order)
            size = self.block_size
            if self.group_size:
                size = -(-size // self.group_size) * self.group_size
            solved = sweep(weight, upper, rounding, size)
            if order is not None:
                solved = solved[:, order.argsort()]
            sizes = [len(w) for w in weights]
            parts = zip(
                paths,
                weights,
                solved.split(sizes),
                rounding.scale.split(sizes),
                rounding.zero_point.split(sizes),
                strict=True,
            )
            for path, target, rows, scale, zero_point in parts:
                target.copy_(rows)
                self.install(work, path, scale, zero_point)
        self.round_tables(work)

    @staticmethod
    def _kept(work: SiteWork, path: str, weight: torch.Tensor) -> torch.Tensor:
        """Where an earlier step's zeros are not."""
        if is_sparse(work.linear(path)):
            return weight != 0
        return torch.ones_like(weight, dtype=torch.bool)


class _Grid:
    """Rounds columns to the grid; see :class:`compress.linear.sweep.Rounding`."""

    def __init__(
        self,
        method: GPTQ,
        work: SiteWork,
        shape: torch.Size,
        keep: torch.Tensor,
        fitted: tuple[torch.Tensor, torch.Tensor] | None,
        order: torch.Tensor | None,
    ) -> None:
        self.method, self.work = method, work
        rows, columns = shape
        self.group = method.group_size or columns
        self.keep = None if bool(keep.all()) else keep.t()
        # Group of each column in the order of the sweep.
        source = torch.arange(columns) if order is None else order.cpu()
        self.group_of = (source // self.group).tolist()
        self.low, self.high = method.scheme.code_range
        groups = columns // self.group
        if fitted is None:
            self.scale = torch.ones(rows, groups, device=keep.device)
            self.zero_point = torch.zeros(rows, groups, dtype=torch.int8, device=keep.device)
        else:
            self.scale, self.zero_point = fitted
        self.fit_on_entry = fitted is None
        # Transposed float copies [groups, rows]: the sweep reads one contiguous row a column.
        self._scale = self.scale.t().contiguous()
        self._zero = self.zero_point.t().float().contiguous()

    def enter(self, start: int, stop: int, block: torch.Tensor, diagonal: torch.Tensor) -> None:
        self.start = start

    def column(self, index: int, value: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
        group = self.group_of[index]
        if self.fit_on_entry and index % self.group == 0:
            first = index - self.start
            current = block[first : first + self.group].t()
            scale, zero_point = self.method.fit(current.contiguous(), self.work)
            self.scale[:, group : group + 1], self.zero_point[:, group : group + 1] = (
                scale,
                zero_point,
            )
            self._scale[group] = self.scale[:, group]
            self._zero[group] = self.zero_point[:, group].float()
        scale, zero = self._scale[group], self._zero[group]
        codes = (value / scale).add_(zero).round_().clamp_(self.low, self.high)
        rounded = codes.sub_(zero).mul_(scale)
        return rounded if self.keep is None else rounded * self.keep[index]
