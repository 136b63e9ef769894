"""GPTQ: round column by column and let the columns to come make up for the error."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from pydantic import Field
from torch import nn

from compress.linear.algebra import inverse_cholesky
from compress.linear.grid import QuantScheme
from compress.linear.matrix import is_sparse
from compress.linear.statistics import GRAM, InputStatistics
from compress.linear.sweep import sweep, sweep_bytes, sweep_work
from compress.methods.passes import Effort, Pass, Shapes, Stream
from compress.methods.quantize.base import GridOfRows, QuantizeMethod, TableRounding
from compress.methods.work import OuterWork, SiteWork
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

    def solving_work(self, shapes: Shapes) -> Effort:
        return Effort(*sweep_work(shapes))

    def passes(self) -> tuple[Pass, ...]:
        closing = self.round_embeddings if self.embeddings else None
        return (Stream((self.sites,), closing=closing),)

    def solve(self, work: SiteWork) -> None:
        for paths, statistics in work.groups():
            weights = [work.weight(path) for path in paths]
            keep = torch.cat([self._kept(work, p, w) for p, w in zip(paths, weights, strict=True)])
            sweeping = self._sweeping(
                self.scheme, statistics.gram, work.storage_dtype, work.label(paths[0])
            )
            solved, (scale, zero_point) = sweeping(torch.cat(weights), keep)
            sizes = [len(w) for w in weights]
            parts = zip(
                paths, weights, solved.split(sizes), scale.split(sizes), zero_point.split(sizes),
                strict=True,
            )  # fmt: skip
            for path, target, rows, row_scale, row_zero in parts:
                target.copy_(rows)
                self.install(work, path, row_scale, row_zero)
        self.round_tables(work)

    def table_rounding(self, work: OuterWork, table: nn.Module) -> TableRounding:
        """The head is a linear as all others: an error in it counts by what enters it. Where the
        embedding is tied to it that decides, as the embedding's own errors cost a twentieth of the
        head's (SmolLM2-135M, 4 bits: 0.3 % of perplexity to nearest, against 8 %)."""
        scheme, statistics = self.embedding_scheme, None
        assert scheme is not None
        head = work.model.get_output_embeddings()
        if head is not None and head.weight is table.weight:
            for x in work.head_inputs():
                if statistics is None:
                    statistics = InputStatistics(x.shape[-1], GRAM, x.device)
                statistics.update(x)
        if statistics is None:
            return super().table_rounding(work, table)
        return self._sweeping(scheme, statistics.gram, work.storage_dtype, "the head")

    def _sweeping(
        self, scheme: QuantScheme, gram: torch.Tensor, dtype: torch.dtype, label: str
    ) -> Callable[..., tuple[torch.Tensor, GridOfRows]]:
        """A function that rounds rows [out, in] of weights whose inputs have this Gram matrix, and
        keeps the zeros of ``keep`` (a mask; None: there are none)."""
        order = None
        if self.actorder:
            order = gram.diagonal().argsort(descending=True, stable=True)
            gram = gram[order][:, order]
        upper, _ = inverse_cholesky(gram, self.damping, label)
        size = self.block_size
        if self.group_size:
            size = -(-size // self.group_size) * self.group_size

        def fit(weight: torch.Tensor) -> GridOfRows:
            return self.fitted(weight, scheme, dtype)

        def sweep_rows(
            weight: torch.Tensor, keep: torch.Tensor | None = None
        ) -> tuple[torch.Tensor, GridOfRows]:
            # A whole channel is fitted beforehand in any case: no column precedes it.
            found = fit(weight) if self.actorder or not self.group_size else None
            if order is not None:
                weight, keep = weight[:, order], None if keep is None else keep[:, order]
            rounding = _Grid(scheme, fit, weight, keep, found, order)
            solved = sweep(weight, upper, rounding, size)
            if order is not None:
                solved = solved[:, order.argsort()]
            return solved, (rounding.scale, rounding.zero_point)

        return sweep_rows

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
        scheme: QuantScheme,
        fit: Callable[[torch.Tensor], GridOfRows],
        weight: torch.Tensor,
        keep: torch.Tensor | None,
        fitted: GridOfRows | None,
        order: torch.Tensor | None,
    ) -> None:
        self.fit = fit
        rows, columns = weight.shape
        self.group = scheme.group_size or columns
        self.keep = None if keep is None or bool(keep.all()) else keep.t()
        # Group of each column in the order of the sweep.
        source = torch.arange(columns) if order is None else order.cpu()
        self.group_of = (source // self.group).tolist()
        self.low, self.high = scheme.code_range
        groups = columns // self.group
        if fitted is None:
            self.scale = torch.ones(rows, groups, device=weight.device)
            self.zero_point = torch.zeros(rows, groups, dtype=torch.int8, device=weight.device)
        else:
            self.scale, self.zero_point = fitted
        self.fit_on_entry = fitted is None
        self.together = self.group if self.fit_on_entry else 1
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
            scale, zero_point = self.fit(current.contiguous())
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
