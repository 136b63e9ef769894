"""What all quantisers of weights share: their options, checks, predictions, and fitting a grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from compress.errors import CompressError
from compress.linear.grid import (
    QuantScheme,
    fake_quantize,
    find_group_qparams,
    group_size_fix,
    half_scale_bits,
)
from compress.linear.layer import parts_of, tables_of
from compress.linear.matrix import as_linear
from compress.linear.quantized import QuantizedLinear
from compress.linear.tables import Grid
from compress.methods.base import CALIBRATION, PRECISION, VALUES, LinearMethod
from compress.methods.passes import Pass, Stream
from compress.methods.work import OuterWork, SiteWork
from compress.models.anatomy import Anatomy
from compress.models.outline import LinearOutline, Outline, token_tables

# The search for a better grid (GPTQ's code, Quantizer with mse=True): shrink the range in steps of
# one hundredth down to a fifth, and weigh errors by a power that punishes outliers a little more.
# Beyond that code, a range up to a tenth wider is tried too: zero points are whole numbers, and the
# values of a small group, which few levels hold, may lie nearer to those of another step.
_SHRINK_STEPS, _SMALLEST, _GROWN, _POWER = 100, 0.2, 0.1, 2.4
# Values of an embedding that are rounded at once.
_PIECE = 2**20

GridOfRows = tuple[torch.Tensor, torch.Tensor]  # scale and zero point [rows, groups]
# Rows [some, width] of a table -> as they are on the grid, and the grid.
TableRounding = Callable[[torch.Tensor], tuple[torch.Tensor, GridOfRows]]


class QuantizeMethod(LinearMethod):
    """Options of weight quantisers. Groups run along the input dimension."""

    writes: ClassVar[frozenset[str]] = frozenset({VALUES, PRECISION})

    bits: int = Field(4, ge=2, le=8, description="Bits a weight.")
    group_size: int | None = Field(
        128,
        ge=1,
        description="Consecutive inputs that share a scale; null: one scale an output channel.",
    )
    symmetric: bool = Field(
        True, description="No zero points. vLLM's fast 4-bit kernels need symmetric grids."
    )
    observer: Literal["minmax", "mse"] = Field(
        "minmax",
        description="How the range of a group is fitted: to its extremes, or scaled to the least "
        "error (slower, usually better at 4 bits and below).",
    )

    scales: Literal["stored", "float16"] = Field(
        "stored",
        description="Precision of scales: as the checkpoint stores them, or numbers that float16 "
        "holds (with zero points, minima too), so that an export to GGUF changes none.",
    )
    embeddings: Literal[8, 4] | None = Field(
        None,
        description="Bits of the embedding of tokens and of the head, on the same kind of grid: to "
        "nearest; by gptq the head, and an embedding tied to it, with regard to what enters the "
        "head. What is tied stays tied. Stock transformers cannot read the result, `import "
        "compress` can. null: they are left as they are.",
    )

    @property
    def scheme(self) -> QuantScheme:
        return QuantScheme(bits=self.bits, group_size=self.group_size, symmetric=self.symmetric)

    @property
    def embedding_scheme(self) -> QuantScheme | None:
        """The grid of embeddings; None where they are left alone."""
        if self.embeddings is None:
            return None
        return QuantScheme(
            bits=self.embeddings, group_size=self.group_size, symmetric=self.symmetric
        )

    def passes(self) -> tuple[Pass, ...]:
        outer = self.round_embeddings if self.embeddings else None
        return (Stream((self.sites,), inputs=self.needs == CALIBRATION, outer=outer),)

    def check(self, anatomy: Anatomy, outline: Outline) -> None:
        super().check(anatomy, outline)
        linears = {
            f"{block.anatomy.path}.{name}": block.linears[name]
            for block in outline.blocks
            for site in block.anatomy.sites
            for name in self.targets(block.anatomy, site)
        }
        widths = {width for linear in linears.values() for _, width in linear.roundable}
        if self.embeddings is not None:
            widths |= {width for _, width in outline.tables}
            self._check_tables(outline, widths)
        for label, linear in linears.items():
            self._check_linear(linear, label, widths)

    def _check_tables(self, outline: Outline, widths: set[int]) -> None:
        if not outline.tables:
            raise CompressError(
                "an embedding of tokens to round", "a model without one", "Leave out `embeddings`"
            )
        if outline.table_bits is not None:
            raise CompressError(
                "embeddings in floating point", "ones that an earlier step has rounded",
                "Give `embeddings` in one step",
            )  # fmt: skip
        for rows, columns in outline.tables:
            if self.group_size and columns % self.group_size:
                raise CompressError(
                    f"embeddings as wide as a multiple of group_size {self.group_size}",
                    f"{rows} of {columns}",
                    f"{group_size_fix(widths, self.group_size)}, or leave out `embeddings`",
                )  # fmt: skip

    def _check_linear(self, linear: LinearOutline, label: str, widths: set[int]) -> None:
        if linear.quantized:
            raise CompressError(
                "layers in floating point",
                f"{label}, which an earlier step has quantised",
                "Quantise a layer once: exclude it from one of the two steps",
            )
        if linear.weights and not linear.roundable:
            raise CompressError(
                "linears, or layers whose numbers are in linears",
                f"a layer of kind {linear.layer} at {label}",
                "Exclude it, or put this step before the one that made it",
            )
        for _, width in linear.roundable:
            if self.group_size and width % self.group_size:
                raise CompressError(
                    f"input widths divisible by group_size {self.group_size}",
                    f"{width} at {label}",
                    f"{group_size_fix(widths, self.group_size)}, or exclude the layer",
                )

    def predict(self, outline: Outline) -> Outline:
        def change(linear: LinearOutline) -> LinearOutline:
            if not linear.weights:
                return linear
            stored = sum(
                rows * self._row_bits(width, outline.value_bits) for rows, width in linear.roundable
            )
            return replace(linear, bits=stored / linear.weights, quantized=True)

        after = self.predict_linears(outline, change)
        scheme = self.embedding_scheme
        if scheme is None:
            return after
        stored = sum(r * _row_bits(scheme, c, outline.value_bits) for r, c in outline.tables)
        return replace(after, table_bits=stored / sum(r * c for r, c in outline.tables))

    def _row_bits(self, width: int, value_bits: int) -> float:
        """Stored bits of a row: packed into whole int32 words, as zero points are; its scales."""
        return _row_bits(self.scheme, width, value_bits)

    def fit(self, weight: torch.Tensor, work: SiteWork) -> tuple[torch.Tensor, torch.Tensor]:
        """Fit the grid of a weight [out, in]: scale and zero point [out, groups]."""
        return self.fitted(weight, self.scheme, work.storage_dtype)

    def fitted(
        self, weight: torch.Tensor, scheme: QuantScheme, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        bits = half_scale_bits(scheme) if self.scales == "float16" else None
        scale, zero_point = find_group_qparams(weight, scheme, dtype, bits)
        if self.observer == "minmax":
            return scale, zero_point
        rows, groups = scale.shape
        flat = weight.float().reshape(rows * groups, -1)
        scheme = scheme.model_copy(update={"group_size": None})
        best_scale, best_zero = scale.reshape(-1, 1), zero_point.reshape(-1, 1)
        best_error = _error(flat, best_scale, best_zero, scheme)
        for step in range(-round(_SHRINK_STEPS * _GROWN), int(_SHRINK_STEPS * (1 - _SMALLEST))):
            if step == 0:
                continue
            factor = 1 - step / _SHRINK_STEPS
            trial, zero = find_group_qparams(flat * factor, scheme, dtype, bits)
            error = _error(flat, trial, zero, scheme)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, trial, best_scale)
            best_zero = torch.where(better, zero, best_zero)
        return best_scale.view(rows, groups), best_zero.view(rows, groups)

    def round_embeddings(self, work: OuterWork) -> None:
        """Round the embedding of tokens, and the head where it is another matrix."""
        scheme = self.embedding_scheme
        assert scheme is not None
        for module in token_tables(work.model):
            weight, grids = module.weight.data, []
            round_rows = self.table_rounding(work, module)
            for rows in weight.split(max(1, _PIECE // weight.shape[1])):
                rounded, grid = round_rows(rows)
                rows.copy_(rounded)
                grids.append(grid)
            scale, zero_point = (torch.cat(parts) for parts in zip(*grids, strict=True))
            module.grid = Grid(scheme, scale, None if scheme.symmetric else zero_point)

    def table_rounding(self, work: OuterWork, table: nn.Module) -> TableRounding:
        """How the rows of an embedding or a head are rounded: each weight to the nearest."""
        scheme = self.embedding_scheme
        assert scheme is not None

        def nearest(rows: torch.Tensor) -> tuple[torch.Tensor, GridOfRows]:
            grid = self.fitted(rows, scheme, work.storage_dtype)
            return fake_quantize(rows, *grid, scheme), grid

        return nearest

    def round_tables(self, work: SiteWork) -> None:
        """Round the numbers of layers that no input passes one by one, each to the nearest."""
        for name in work.names:
            layer = work.linear(name)
            if parts_of(layer, name):
                continue
            for path in tables_of(layer, name):
                self.install(work, path, *self.fit(work.weight(path), work))

    def install(
        self, work: SiteWork, path: str, scale: torch.Tensor, zero_point: torch.Tensor
    ) -> None:
        """Put a QuantizedLinear on the grid in the place of the linear at ``path``."""
        linear = as_linear(work.linear(path))
        work.replace(path, QuantizedLinear.from_linear(linear, self.scheme, scale, zero_point))


def _row_bits(scheme: QuantScheme, width: int, value_bits: int) -> float:
    # Weight-only schemes pack into int32; W8A8 stores int8.
    packs = scheme.activation_bits is None
    packed = -(-width * scheme.bits // 32) * 32 if packs else 8 * width
    groups = scheme.groups(width)
    return packed + groups * (value_bits + (0 if scheme.symmetric else scheme.bits))


def _error(
    weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, scheme: QuantScheme
) -> torch.Tensor:
    """Error of rounding each row, [rows, 1]."""
    rounded = fake_quantize(weight, scale, zero_point, scheme)
    return (rounded - weight).abs_().pow_(_POWER).sum(1, keepdim=True)
