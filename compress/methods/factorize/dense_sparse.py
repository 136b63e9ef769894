"""DSFormer: each weight as a small dense dictionary times sparse coefficients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from compress.errors import CompressError
from compress.linear.algebra import damped
from compress.linear.dense_sparse import DenseSparseLinear, index_dtype
from compress.linear.dictionary import (
    Form,
    factorise,
    factorise_bytes,
    factorise_work,
    packed,
)
from compress.linear.matrix import as_linear
from compress.linear.statistics import GRAM, MOMENTS, NOTHING
from compress.methods.base import MODULES, VALUES, LinearMethod
from compress.methods.factorize.base import check_plain, refuse_changed
from compress.methods.factorize.forms import form_for, tables_of_form
from compress.methods.factorize.sensitivity import LEVELS, losses, shared_out
from compress.methods.passes import Learn, Pass, Shapes, Stream, Survey
from compress.methods.work import BlockSurvey, SiteWork
from compress.models.anatomy import Anatomy, Site
from compress.models.outline import LinearOutline, Outline
from compress.train.moment import derive_seed
from compress.train.options import TrainingOptions
from compress.train.reconstruction import BlockWork, learn_outputs


class DenseSparseMethod(LinearMethod):
    """Replace W [out, in] by S^T D^T: D a dictionary for each block of inputs, S with exactly k
    non-zeros a block in each column, so that every output picks its own few atoms.

    Atoms and coefficients are found by turns, with the least error of the outputs on calibration
    inputs. ``refine`` then tunes both, block by block, to what the dense block returns.
    """

    name: ClassVar[str] = "dense_sparse"
    summary: ClassVar[str] = "a dense dictionary times sparse coefficients, tuned block by block"
    source: ClassVar[str] = (
        "Chand, Prabhu & Kumar 2023, arXiv 2312.13211 (the form; how it is found is our own)"
    )
    writes: ClassVar[frozenset[str]] = frozenset({VALUES, MODULES})
    example: ClassVar[dict[str, Any]] = {"ratio": 0.5}

    ratio: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of the bytes of a matrix that stay, indices counted: 0.5 is half the "
        "size. Give this, or blocks, rank and nonzeros.",
    )
    width: int | None = Field(
        None,
        ge=1,
        description="With ratio: inputs of a block, the divisor next to it; by default what gives "
        "the dictionary three tenths of the bytes.",
    )
    atoms: float = Field(
        2.0,
        ge=1,
        description="With ratio: atoms for each input of a block. More of them lose less; the time "
        "grows with their square.",
    )
    blocks: int = Field(1, ge=1, description="With rank: blocks that the inputs are cut into.")
    rank: int | None = Field(None, ge=1, le=2**16, description="Atoms of each block's dictionary.")
    nonzeros: int | None = Field(
        None, ge=1, description="With rank: atoms of each block that an output is made of."
    )
    allocation: Literal["uniform", "sensitivity"] = Field(
        "uniform",
        description="With ratio: the same for every matrix, or more for those that lose more, "
        "all together the same.",
    )
    weighting: Literal["activation", "plain"] = Field(
        "activation",
        description="What errors are measured in: the outputs on calibration inputs, or the "
        "weights themselves.",
    )
    coding: Literal["directions", "pursuit", "correlation"] = Field(
        "directions",
        description="How atoms are chosen: alternating directions, batch orthogonal matching "
        "pursuit (slow where nonzeros are many), or those that go best by themselves.",
    )
    rounds: int = Field(10, ge=1, description="Sparse codings, with a new dictionary between two.")
    damping: float = Field(
        1e-3, ge=0, description="Share of the mean square of the inputs added to all of them."
    )
    seed: int = Field(0, ge=0, description="Of the outputs that dictionaries begin with.")
    refine: TrainingOptions | None = Field(
        None,
        description="Afterwards train dictionaries and values of each block on the dense block's "
        "outputs; a batch counts calibration batches.",
    )

    @model_validator(mode="after")
    def _one_target(self):
        if (self.ratio is None) == (self.rank is None):
            raise ValueError("give either ratio (of bytes that stay) or rank and nonzeros")
        if (self.rank is None) != (self.nonzeros is None):
            raise ValueError("rank and nonzeros go together")
        if self.rank is not None and self.nonzeros > self.rank:
            raise ValueError(f"nonzeros {self.nonzeros} are more than the atoms there are")
        if self.ratio is None and (self.allocation != "uniform" or self.width is not None):
            raise ValueError("allocation and width go with ratio")
        if self.ratio is not None and self.blocks != 1:
            raise ValueError("blocks go with rank; with ratio give width")
        if self.allocation == "sensitivity" and self.ratio <= LEVELS[0]:
            raise ValueError(f"a ratio above {LEVELS[0]}, below which no matrix is taken")
        return self

    def form(
        self, out_features: int, in_features: int, value_bytes: int, ratio: float | None = None
    ) -> Form | None:
        """The form of a matrix; None where it is left alone."""
        if self.rank is None:
            share = self.ratio if ratio is None else ratio
            if share >= 1:
                return None
            return form_for(out_features, in_features, share, value_bytes, self.atoms, self.width)
        return Form(self.blocks, self.rank, self.nonzeros)

    def statistic(self, site: Site) -> str:
        return GRAM if self.weighting == "activation" else NOTHING

    def _linears(self, outline: Outline) -> Iterator[tuple[str, LinearOutline]]:
        for block in outline.blocks:
            for site in block.anatomy.sites:
                for name in self.targets(block.anatomy, site):
                    yield f"{block.anatomy.path}.{name}", block.linears[name]

    def check(self, anatomy: Anatomy, outline: Outline) -> None:
        super().check(anatomy, outline)
        found = []
        for label, linear in self._linears(outline):
            check_plain(linear, label, self.name)
            if self.rank is not None and linear.in_features % self.blocks:
                raise CompressError(
                    f"inputs that {self.blocks} blocks divide", f"{linear.in_features} at {label}",
                    "Choose another number of blocks, or exclude the layer",
                )  # fmt: skip
            size = linear.out_features, linear.in_features
            found.append(self.form(*size, outline.value_bits // 8))
        if not any(found):
            raise CompressError(
                "a ratio that leaves room for one non-zero a block", f"ratio={self.ratio}",
                "Raise the ratio, or the width",
            )  # fmt: skip

    def predict(self, outline: Outline) -> Outline:
        """Exact where the allocation is uniform; else every matrix as if it were."""

        def change(linear: LinearOutline) -> LinearOutline:
            size = linear.out_features, linear.in_features
            form = self.form(*size, outline.value_bits // 8)
            if form is None:
                return linear
            tables = tables_of_form(*size, form)
            values = tables[1][0] * tables[1][1]
            extra = values * index_dtype(form.rank).itemsize
            return linear.replaced("dense_sparse", tables, extra)

        return self.predict_linears(outline, change)

    def passes(self) -> tuple[Pass, ...]:
        actions: list[Any] = [self.sites]
        if self.refine is not None:
            actions.append(Learn(self.refine_block, self.refine, self._learning_bytes))
        stream = Stream(
            tuple(actions), inputs=self.weighting == "activation" or self.refine is not None,
            settle=_open if self.refine is not None else None,
        )  # fmt: skip
        if self.allocation == "uniform":
            return (stream,)
        return Survey(self.observe, self.decide, lambda _site: MOMENTS), stream

    def observe(self, survey: BlockSurvey) -> dict[str, dict[str, Any]]:
        """What each linear of a block would lose, by level."""
        found = {}
        for site in survey.anatomy.sites:
            for name in self.targets(survey.anatomy, site):
                weight = as_linear(survey.block.get_submodule(name)).weight.data
                curve = losses(weight, survey.statistics[name].norm)
                found[f"{survey.anatomy.path}.{name}"] = {"losses": curve, "size": weight.numel()}
        return found

    def decide(self, notes: list[dict[str, Any]], _anatomy: Anatomy) -> dict[str, float]:
        linears = {name: note for block in notes for name, note in block.items()}
        curves = {name: note["losses"] for name, note in linears.items()}
        return shared_out(curves, {n: note["size"] for n, note in linears.items()}, self.ratio)

    def solving_bytes(self, shapes: Shapes, gram: bool) -> int:
        """Of the largest matrix: its metric twice, what the factorisation takes, or what the layer
        multiplies with while later sites are observed."""
        found = 0
        for out, width in shapes:
            for value_bytes in (2, 4):
                form = self._largest(out, width, value_bytes)
                if form is not None:
                    solving = 12 * width**2 + factorise_bytes(out, width, form)
                    found = max(found, solving, _product_bytes(out, width, form))
        return found

    def solving_work(self, shapes: Shapes) -> float:
        work = 0.0
        for out, width in shapes:
            form = self.form(out, width, 4)
            if form is not None:
                work += factorise_work(out, width, form, self.rounds)
        return work

    def _largest(self, out: int, width: int, value_bytes: int) -> Form | None:
        """The form that takes the most memory to find."""
        most = LEVELS[-2] if self.allocation == "sensitivity" else None
        return self.form(out, width, value_bytes, most)

    def solve(self, work: SiteWork) -> None:
        for name in work.names:
            linear = work.linear(name)
            refuse_changed(linear, work.label(name), self.name)
            plain = as_linear(linear)
            weight, label = plain.weight.data, work.label(name)
            ratio = work.decision[label] if work.decision else None
            form = self.form(*weight.shape, work.storage_dtype.itemsize, ratio)
            if form is None:
                work.metrics[f"{name}.left_alone"] = 1
                continue
            generator = torch.Generator().manual_seed(derive_seed(label, self.seed))
            found = factorise(
                weight.float(), self._metric(work, name), form, self.rounds, self.coding, generator
            )
            layer = DenseSparseLinear(
                weight.shape[1], weight.shape[0], form.blocks, form.rank, form.nonzeros,
                bias=False, device="meta",
            )  # fmt: skip
            values, indices = packed(found, form)
            learns = plain.weight.requires_grad
            for table, tensor in ((layer.dictionary, found.atoms), (layer.values, values)):
                tensor = tensor.reshape(table.weight.shape).to(weight.dtype).contiguous()
                table.weight = nn.Parameter(tensor, requires_grad=learns)
            layer.indices, layer.bias = indices.to(index_dtype(form.rank)), plain.bias
            work.replace(name, layer.train(linear.training))
            work.metrics[f"{name}.rank"] = form.rank
            work.metrics[f"{name}.nonzeros"] = form.blocks * form.nonzeros
            work.metrics[f"{name}.error"] = found.errors[-1]

    def _metric(self, work: SiteWork, name: str) -> torch.Tensor:
        if self.weighting == "plain":
            weight = work.weight(name)
            return torch.eye(weight.shape[1], device=weight.device)
        return damped(work.statistics[name].gram, self.damping)[0]

    def refine_block(self, work: BlockWork) -> None:
        names = [name for site in work.anatomy.sites for name in self.targets(work.anatomy, site)]
        layers = [work.block.get_submodule(name) for name in names]
        chosen = [
            table.weight
            for layer in layers
            if isinstance(layer, DenseSparseLinear)
            for table in (layer.dictionary, layer.values)
        ]
        if not chosen:
            return  # a block that the step leaves out
        for parameter in chosen:
            parameter.requires_grad_(True)
        best = learn_outputs(
            work, chosen, self.refine, prepare=lambda _moment: 0.0, settle=lambda: None
        )
        work.metrics |= best.metrics("refine")

    def _learning_bytes(self, shapes: Shapes) -> int:
        found = 0
        for out, width in shapes:
            form = self._largest(out, width, 4)
            if form is not None:
                tables = sum(rows * columns for rows, columns in tables_of_form(out, width, form))
                # Gradient, two averages of Adam, the start and the best so far; what each layer
                # multiplies with is kept for the backward pass.
                found += 20 * tables + _product_bytes(out, width, form)
        return found


def _product_bytes(out: int, width: int, form: Form) -> int:
    """Bytes of a layer's product with all that it is made from."""
    sparse = out * form.blocks * form.rank
    return 8 * out * width + 8 * sparse + 8 * out * form.blocks * form.nonzeros


def _open(block: nn.Module) -> None:
    """Leave the parameters of new layers as modules have them when they are made."""
    for layer in block.modules():
        if isinstance(layer, DenseSparseLinear):
            layer.requires_grad_(True)
