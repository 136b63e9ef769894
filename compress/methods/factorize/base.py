"""Low-rank factorisation: options, checks and the replacement of a linear by two."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import nn

from compress.errors import CompressError
from compress.linear.algebra import principal_outputs
from compress.linear.low_rank import LowRankLinear
from compress.linear.matrix import as_linear
from compress.linear.statistics import InputStatistics
from compress.methods.base import MODULES, VALUES, LinearMethod
from compress.methods.passes import Effort, Shapes
from compress.methods.work import SiteWork
from compress.models.anatomy import Anatomy
from compress.models.outline import LinearOutline, Outline, linear_outline


class FactorizeMethod(LinearMethod):
    """Replaces W [out, in] by U (U^T W), U the ``rank`` leading directions of the outputs.

    For whatever metric a method measures inputs in, the best approximation of W of a given rank is
    its projection on the leading left singular vectors U of W S, with S a square root of the
    metric: U_r S_r V_r^T S^-1 = U_r U_r^T W. So nothing is ever inverted, and a singular metric
    does no harm. The first factor is U^T W, the second U, whose columns are orthonormal.

    Matrices that two factors would not make smaller are left as they are.
    """

    writes: ClassVar[frozenset[str]] = frozenset({VALUES, MODULES})
    example: ClassVar[dict[str, Any]] = {"ratio": 0.5}

    ratio: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of parameters that stay in a matrix [m, n]: rank = "
        "floor(ratio * m * n / (m + n)). Give this or `rank`.",
    )
    rank: int | None = Field(None, ge=1, description="One rank for all matrices.")
    round_to: int = Field(
        1, ge=1, description="Ranks are rounded down to a multiple of this (at least one of it)."
    )

    @model_validator(mode="after")
    def _one_target(self):
        if (self.ratio is None) == (self.rank is None):
            raise ValueError("give either ratio (of parameters that stay) or rank")
        return self

    def rank_of(self, out_features: int, in_features: int) -> int:
        """Rank for a matrix of this size; 0 where it is left alone."""
        rank = self.rank
        if rank is None:
            rank = int(self.ratio * out_features * in_features / (out_features + in_features))
        rank = max(rank // self.round_to, 1) * self.round_to
        smaller = rank * (out_features + in_features) < out_features * in_features
        return rank if smaller else 0

    def check(self, anatomy: Anatomy, outline: Outline) -> None:
        super().check(anatomy, outline)
        ranks = []
        for block in outline.blocks:
            for site in block.anatomy.sites:
                for name in self.targets(block.anatomy, site):
                    linear = block.linears[name]
                    check_plain(linear, f"{block.anatomy.path}.{name}", self.name)
                    ranks.append(self.rank_of(linear.out_features, linear.in_features))
        if not any(ranks):
            raise CompressError(
                "a rank below m n / (m + n) for at least one matrix [m, n]",
                f"ratio={self.ratio} rank={self.rank} round_to={self.round_to}, at which two "
                "factors are no smaller than any of the matrices",
                "Lower the rank, or round_to",
            )

    def predict(self, outline: Outline) -> Outline:
        def change(linear: LinearOutline) -> LinearOutline:
            return linear.factorised(self.rank_of(linear.out_features, linear.in_features))

        return self.predict_linears(outline, change)

    def solving_bytes(self, shapes: list[tuple[int, int]], gram: bool) -> int:
        """Eigenvectors in float64 of the smaller side, six matrices of it, beside the weight."""
        found = 0
        for out, width in shapes:
            side = width if gram and out > width else min(out, width)
            metric = 12 * width**2 if gram else 0
            found = max(found, 48 * side**2 + 16 * out * width + metric)
        return found

    def solving_work(self, shapes: Shapes) -> Effort:
        # An eigendecomposition and three products in float64.
        sides = [(min(shape), max(shape)) for shape in shapes]
        return Effort(sum(18.0 * short**3 + 3 * long * short**2 for short, long in sides))

    def prepared(self, work: SiteWork, name: str) -> int:
        """The rank of a linear that can be factorised; 0, with a note, where it is left alone."""
        refuse_changed(work.linear(name), work.label(name), self.name)
        rank = self.rank_of(*work.weight(name).shape)
        if rank == 0:
            work.metrics[f"{name}.left_alone"] = 1
        return rank

    def solve(self, work: SiteWork) -> None:
        for name in work.names:
            rank = self.prepared(work, name)
            if rank == 0:
                continue
            linear, weight = work.linear(name), work.weight(name)
            statistics = work.statistics.get(name)
            basis, lost = self.directions(weight, rank, statistics, work.label(name))
            work.replace(name, low_rank(linear, basis))
            work.metrics[f"{name}.rank"] = rank
            work.metrics[f"{name}.error"] = lost

    def directions(
        self, weight: torch.Tensor, rank: int, statistics: InputStatistics | None, label: str
    ) -> tuple[torch.Tensor, float]:
        """Leading output directions [out, rank] in the method's metric, and the share of the energy
        of W S outside of them."""
        return principal_outputs(weight, rank)


def low_rank(linear: nn.Module, basis: torch.Tensor) -> LowRankLinear:
    """The pair that projects a linear's output on the columns of ``basis`` [out, rank]."""
    plain = as_linear(linear)
    return low_rank_pair(plain, basis.t() @ plain.weight.data.double(), basis)


def low_rank_pair(linear: nn.Module, first: torch.Tensor, second: torch.Tensor) -> LowRankLinear:
    """Two factors, [rank, in] and [out, rank], in the place of a linear, whose bias they share."""
    plain = as_linear(linear)
    out_features, in_features = plain.weight.shape
    pair = LowRankLinear(
        in_features, out_features, len(first), bias=plain.bias is not None, device="meta"
    )
    learn, dtype = plain.weight.requires_grad, plain.weight.dtype
    for part, factor in ((pair.first, first), (pair.second, second)):
        part.weight = nn.Parameter(factor.to(dtype).contiguous(), requires_grad=learn)
    pair.second.bias = plain.bias
    return pair.train(linear.training)


def check_plain(linear: LinearOutline, label: str, method: str) -> None:
    if linear.quantized:
        raise CompressError(
            "layers in floating point",
            f"{label}, which an earlier step has quantised",
            f"Put {method} before the quantisation, which then rounds both factors",
        )
    if linear.layer:
        raise CompressError(
            "plain linear layers",
            f"{label}, in whose place an earlier step has put a layer of kind {linear.layer}",
            "Factorise a layer once: exclude it from one of the two steps",
        )
    if linear.density < 1:
        raise CompressError(
            "layers without zeros to keep",
            f"{label}, which an earlier step has pruned",
            f"Put {method} before the sparsity step, which then prunes both factors",
        )


def refuse_changed(linear: nn.Module, label: str, method: str) -> None:
    """The same for a live model, which no plan has looked at."""
    found = replace(
        linear_outline(linear, 32), density=0.0 if getattr(linear, "zeros", None) else 1.0
    )
    check_plain(found, label, method)
