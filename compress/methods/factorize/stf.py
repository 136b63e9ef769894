"""STF: the factors of all dense-sparse layers learn together from the loss of the task."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from compress.errors import CompressError
from compress.linear.dense_sparse import DenseSparse, DenseSparseLinear
from compress.methods.base import VALUES, LinearMethod
from compress.methods.factorize.information import check_loss
from compress.methods.factorize.stf_layers import MODES, Factors
from compress.methods.factorize.stf_learning import learn_supports, learn_values, teacher_of
from compress.methods.passes import Pass, Shapes, Sites, Stream, TrainModel
from compress.methods.work import SiteWork
from compress.models.anatomy import Anatomy
from compress.models.outline import LinearOutline, Outline
from compress.train.language import DistillationOptions, check_compared
from compress.train.options import TrainingOptions
from compress.train.whole import ModelWork


class STF(LinearMethod):
    """Learn dictionaries, coefficients and which coefficients there are, of the whole model.

    A factorisation chooses its supports before anything is known of the task. Here they are chosen
    anew while the model learns: what is off a support gets the gradient that it would have on it
    (straight through the choice) and may come in. Then the supports stay, and dictionaries and
    non-zeros learn on.

    Comes after ``dense_sparse``, whose forms stay. The paper's body could not be read; what its
    abstract leaves open is decided here.
    """

    name: ClassVar[str] = "stf"
    summary: ClassVar[str] = "learn dense-sparse factors and their supports from the task's loss"
    source: ClassVar[str] = (
        "Chand, Prabhu & Kumar 2023, DSFormer, arXiv 2312.13211 (the idea; steps are our own)"
    )
    writes: ClassVar[frozenset[str]] = frozenset({VALUES})

    mode: Literal["latent", "proxy"] = Field(
        "latent",
        description="What learns: dictionaries and dense coefficients, of which the largest count; "
        "or dense weights, which are factorised while they learn.",
    )
    every: int = Field(
        5, ge=1, description="Steps between two choices of the supports; the first step has one."
    )
    settled: float = Field(
        0.4,
        ge=0,
        lt=1,
        description="Share of the training, its end, in which the supports stay: each change "
        "leaves the other coefficients where they were best without it.",
    )
    training: TrainingOptions | None = Field(
        TrainingOptions(steps=1000, batch=32, learning_rate=1e-3, warmup=50, final_ratio=0.1),
        description="With supports that change; null leaves them as they are.",
    )
    tuning: TrainingOptions | None = Field(
        None,
        description="Afterwards, with the supports as they are by then, a training of its own.",
    )
    distillation: DistillationOptions | None = Field(
        None,
        description="Learn from the outputs of the model that the recipe began with as well; by "
        "default from the text, or the labels, alone.",
    )
    norms: bool = Field(
        True, description="Norms and biases of the blocks that have such layers learn too."
    )

    @model_validator(mode="after")
    def _learns(self):
        if self.training is None and self.tuning is None:
            raise ValueError("training or tuning: without either nothing learns")
        if self.mode == "proxy" and self.training is not None and self.training.ema is not None:
            raise ValueError(
                "training.ema: with mode: proxy factors follow what learns and have no average; "
                "give it to tuning"
            )
        return self

    def check(self, anatomy: Anatomy, outline: Outline) -> None:
        super().check(anatomy, outline)
        found = self._layers(outline)
        if not found:
            raise CompressError(
                "layers of a dictionary and sparse coefficients", "none where the patterns reach",
                "Put dense_sparse before it",
            )  # fmt: skip
        for label, linear in found.items():
            if linear.quantized:
                raise CompressError(
                    "dictionaries in floating point", f"{label}, which an earlier step has rounded",
                    "Put stf before the step that rounds",
                )  # fmt: skip
        check_loss(self.name, anatomy, outline, "Use dense_sparse with refine, which needs no loss")
        check_compared(self.distillation, len(outline.blocks))

    def _layers(self, outline: Outline) -> dict[str, LinearOutline]:
        """The layers that learn, by path."""
        return {
            f"{block.anatomy.path}.{name}": block.linears[name]
            for block in outline.blocks
            for site in block.anatomy.sites
            for name in self.targets(block.anatomy, site)
            if block.linears[name].layer == _KIND
        }

    def predict(self, outline: Outline) -> Outline:
        return outline

    def passes(self) -> tuple[Pass, ...]:
        # The teacher goes forwards only.
        share = 1 if self.distillation is None else 4 / 3
        options = tuple((o, share) for o in (self.training, self.tuning) if o is not None)
        return (
            TrainModel(
                Sites(self.targets, self.install), self.learn, _keep, options, _nothing,
                teacher=self.distillation is not None, holds=self._learning_bytes,
                work=self._learning_work,
            ),
            Stream((self.sites,), inputs=False),
        )  # fmt: skip

    def install(self, work: SiteWork) -> None:
        """Put what learns in the place of a site's layers."""
        for name in work.names:
            layer = work.linear(name)
            if isinstance(layer, DenseSparseLinear):
                work.replace(name, MODES[self.mode](layer))

    def learn(self, work: ModelWork) -> None:
        factors = {n: m for n, m in work.model.named_modules() if isinstance(m, Factors)}
        vectors = self._vectors(work, factors)
        teacher = teacher_of(work, self.distillation)
        try:
            if self.training is not None:
                learn_supports(
                    work,
                    factors,
                    vectors,
                    self.training,
                    self.every,
                    self.settled,
                    self.distillation,
                    teacher,
                )
                if work.folder is not None:  # checkpoints of the tuning are of another training
                    work.folder = work.folder / "tuning"
        finally:
            layers = [each.settle() for each in factors.values()]
            for name, layer in zip(factors, layers, strict=True):
                work.model.set_submodule(name, layer)
        if self.tuning is not None:
            learn_values(work, layers, vectors, self.tuning, self.distillation, teacher)

    def _vectors(self, work: ModelWork, factors: dict[str, Factors]) -> list[nn.Parameter]:
        if not self.norms:
            return []
        blocks = [
            work.model.get_submodule(block.path)
            for block in work.anatomy.blocks
            if any(name.startswith(f"{block.path}.") for name in factors)
        ]
        return [p for block in blocks for p in _vectors_of(block).values()]

    def solve(self, work: SiteWork) -> None:
        """Give a block what was learned of it."""
        work.block.load_state_dict(work.learned, strict=False)

    def told(self, notes: list[Any]) -> tuple[str, ...]:
        shares = [n["stf.changed"] for n in notes if isinstance(n, dict) and "stf.changed" in n]
        return tuple(
            f"{100 * share:.1f} % of the non-zeros belong to other atoms than at the start"
            for share in shares
        )

    def _learning_work(self, outline: Outline) -> float:
        """Multiply-accumulates of the products of tables in a step, and of their gradients."""
        found = 0.0
        for linear in self._layers(outline).values():
            (atoms, width), (out, _) = linear.tables
            found += 3.0 * out * atoms * width
        return found

    def _learning_bytes(self, outline: Outline) -> int:
        """Bytes of everything that learns, with gradients, two averages of Adam, and what is kept
        for the backward pass."""
        held = largest = 0
        for linear in self._layers(outline).values():
            (atoms, width), (out, values) = linear.tables
            dense, weight = atoms * out, linear.in_features * out
            dictionary = atoms * width
            # The product, its gradient, its cast; the coefficients that it was made from.
            product = 10 * weight + 4 * dense
            if self.mode == "latent":
                learning = 16 * (dense + dictionary) + dense + product
            else:
                learning = 16 * weight + 4 * (dense + dictionary) + dense + product
            # Of the tables themselves; the product is made of more copies there.
            tuning = 12 * (dictionary + out * values) + product + 4 * dense + 8 * out * values
            held += max(
                learning if self.training is not None else 0,
                tuning if self.tuning is not None else 0,
            )
            # Scores, and where the largest are; or what moves, thrice.
            largest = max(largest, 16 * dense + 8 * out * values)
        return held + largest


_KIND = DenseSparse.model_fields["kind"].default


def _vectors_of(block: nn.Module) -> dict[str, nn.Parameter]:
    """Norms and biases of a block."""
    return {n: p for n, p in block.named_parameters() if p.dim() == 1 and p.is_floating_point()}


def _keep(block: nn.Module) -> dict[str, torch.Tensor]:
    """What has learned in a block, by the names that its tensors have there."""
    layers = {n: m for n, m in block.named_modules() if isinstance(m, DenseSparseLinear)}
    if not layers:
        return {}
    found = {f"{n}.{k}": t for n, layer in layers.items() for k, t in layer.state_dict().items()}
    found |= _vectors_of(block)
    return {name: tensor.detach().cpu() for name, tensor in found.items()}


def _nothing(_shapes: Shapes) -> int:
    """Bytes beside those that follow from the forms of layers."""
    return 0
