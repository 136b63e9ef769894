"""DSFormer: each weight as a small dense dictionary times sparse coefficients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
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
from compress.methods.base import MODULES, VALUES
from compress.methods.factorize.base import check_plain, refuse_changed
from compress.methods.factorize.dense_sparse_options import DenseSparseOptions
from compress.methods.factorize.forms import tables_of_form
from compress.methods.factorize.information import (
    check_loss,
    information_pass,
    output_weights,
)
from compress.methods.factorize.sensitivity import losses, shared_out
from compress.methods.passes import Effort, Learn, Pass, Shapes, Stream, Survey
from compress.methods.work import BlockSurvey, SiteWork
from compress.models.anatomy import Anatomy, Site
from compress.models.outline import LinearOutline, Outline
from compress.train.moment import derive_seed
from compress.train.reconstruction import BlockWork, learn_outputs

Keep = Callable[[nn.Module], dict[str, torch.Tensor]]


class DenseSparseMethod(DenseSparseOptions):
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

    def statistic(self, site: Site) -> str:
        return NOTHING if self.weighting == "plain" else GRAM

    def _linears(self, outline: Outline) -> Iterator[tuple[str, LinearOutline]]:
        for block in outline.blocks:
            for site in block.anatomy.sites:
                for name in self.targets(block.anatomy, site):
                    yield f"{block.anatomy.path}.{name}", block.linears[name]

    def check(self, anatomy: Anatomy, outline: Outline) -> None:
        super().check(anatomy, outline)
        if self.weighting == "fisher":
            check_loss(self.name, anatomy, outline, "Use weighting: activation")
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
        return (*self.preparation(), self.initialisation())

    def preparation(self) -> tuple[Pass, ...]:
        """What is to be known before any matrix is factorised."""
        found: list[Pass] = []
        if self.weighting == "fisher":
            found.append(information_pass(self.targets, self.windows))
        if self.allocation == "sensitivity":
            found.append(Survey(self.observe, self.decide, lambda _site: MOMENTS))
        return tuple(found)

    def initialisation(self, keep: Keep | None = None) -> Stream:
        """Factorise and tune block after block; with ``keep`` for a later pass."""
        actions: list[Any] = [self.sites]
        if self.refine is not None:
            actions.append(Learn(self.refine_block, self.refine, self._learning_bytes))
        return Stream(
            tuple(actions), inputs=self.weighting != "plain" or self.refine is not None,
            settle=open_layers if self.refine is not None and keep is None else None, keep=keep,
        )  # fmt: skip

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
        """Of the largest matrix: its metric twice and what the factorisation takes (with weighted
        outputs two copies), or what the layer multiplies with while later sites are observed."""
        found = 0
        for out, width in shapes:
            for value_bytes in (2, 4):
                form = self.largest_form(out, width, value_bytes)
                if form is not None:
                    solving = 12 * width**2 + factorise_bytes(out, width, form, self.coding)
                    solving += 8 * out * width if self.weighting == "fisher" else 0
                    found = max(found, solving, product_bytes(out, width, form))
        return found

    def solving_work(self, shapes: Shapes) -> Effort:
        products = moved = 0.0
        for out, width in shapes:
            form = self.form(out, width, 4)
            if form is not None:
                more, written = factorise_work(out, width, form, self.rounds)
                products, moved = products + more, moved + written
        return Effort(products, moved)

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
            seed = work.seed if self.seed is None else self.seed
            generator = torch.Generator().manual_seed(derive_seed(label, seed))
            target, rows = weight.float(), None
            if self.weighting == "fisher":  # the dictionary favours outputs of much weight
                rows = output_weights(work, name)
                rows = (rows / rows.mean()).float()
                target = rows[:, None] * target
            found = factorise(
                target, self._metric(work, name), form, self.rounds, self.coding, generator
            )
            values, indices = packed(found, form)
            values = values if rows is None else values / rows[:, None]
            work.replace(name, layer_of(linear, form, found.atoms, values, indices))
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
            form = self.largest_form(out, width, 4)
            if form is not None:
                tables = sum(rows * columns for rows, columns in tables_of_form(out, width, form))
                # Gradient, two averages of Adam, the start and the best so far; what each layer
                # multiplies with is made for each batch, and kept for the backward pass.
                found += 20 * tables + self.refine.at_once * product_bytes(out, width, form)
        return found


def product_bytes(out: int, width: int, form: Form) -> int:
    """Bytes of a layer's product with all that it is made from."""
    sparse = out * form.blocks * form.rank
    return 8 * out * width + 8 * sparse + 8 * out * form.blocks * form.nonzeros


def layer_of(
    linear: nn.Module,
    form: Form,
    atoms: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
) -> DenseSparseLinear:
    """A layer in the place of a linear, whose bias it shares.

    Args:
        atoms: [B, r, b], or as many numbers in this order. values, indices: [out, B k].
    """
    plain = as_linear(linear)
    weight = plain.weight
    layer = DenseSparseLinear(
        weight.shape[1], weight.shape[0], form.blocks, form.rank, form.nonzeros, bias=False,
        device="meta",
    )  # fmt: skip
    for table, tensor in ((layer.dictionary, atoms), (layer.values, values)):
        tensor = tensor.reshape(table.weight.shape).to(weight.dtype).contiguous()
        table.weight = nn.Parameter(tensor, requires_grad=weight.requires_grad)
    layer.indices, layer.bias = indices.to(index_dtype(form.rank)), plain.bias
    return layer.train(linear.training)


def open_layers(block: nn.Module) -> None:
    """Leave the parameters of new layers as modules have them when they are made."""
    for layer in block.modules():
        if isinstance(layer, DenseSparseLinear):
            layer.requires_grad_(True)
