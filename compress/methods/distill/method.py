"""Distillation: a compressed model learns from the uncompressed one, after any other method."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from compress.errors import CompressError
from compress.methods.base import PRECISION, VALUES, LinearMethod
from compress.methods.distill.learning import Teaching, learn_block, learn_model, restore
from compress.methods.distill.lora import Adapter, LoraOptions, adapters
from compress.methods.distill.parameters import learning, plain_linears
from compress.methods.passes import Learn, Pass, Shapes, Stream, TrainModel
from compress.methods.work import OuterWork, SiteWork
from compress.models.anatomy import Anatomy, BlockAnatomy, anatomy_of
from compress.models.outline import LinearOutline, Outline
from compress.train.language import DistillationOptions, check_compared
from compress.train.moment import derive_seed
from compress.train.options import TrainingOptions
from compress.train.reconstruction import BlockWork
from compress.train.teacher_cache import cache_bytes
from compress.train.whole import ModelWork

_PREDICTIONS = DistillationOptions(labels=0.0)  # of the teacher, and nothing else


def _default_training(given: dict[str, Any]) -> TrainingOptions:
    """Adapters start from nothing and take ten times the rate of weights that are nearly right.
    Gradients of a block are as small as its error, which nothing has to be clipped for."""
    rate = 10.0 if given.get("train") == "lora" else 1.0
    if given.get("scope") == "model":
        return TrainingOptions(
            steps=500, batch=8, learning_rate=5e-5 * rate, warmup=20, final_ratio=0.1,
            betas=(0.9, 0.95),
        )  # fmt: skip
    return TrainingOptions(
        steps=200, batch=2, learning_rate=1e-4 * rate, final_ratio=0.1, betas=(0.9, 0.95), clip=None
    )


class Distill(LinearMethod):
    """Win back what earlier steps lost, with the model that the recipe began with as teacher.

    ``scope: block`` streams: each block learns to return what the uncompressed model has behind the
    last block that it stands for, from what the compressed blocks in front of it make of the text.
    ``scope: model`` trains all blocks together on the uncompressed model's predictions.

    Whatever earlier steps made stays: zeros are zero, widths, depth and layers are what they were,
    and weights on a grid are not touched.
    """

    name: ClassVar[str] = "distill"
    summary: ClassVar[str] = "learn from the uncompressed model, block by block or as a whole"
    source: ClassVar[str] = (
        "Hinton et al. 2015, arXiv 1503.02531; block by block: Romero et al. 2015, arXiv 1412.6550"
    )
    writes: ClassVar[frozenset[str]] = frozenset({VALUES})
    spares: ClassVar[frozenset[str]] = frozenset({PRECISION})

    train: Literal["full", "lora"] = Field(
        "full",
        description="What learns: the weights, or low-rank adapters of the peft library beside "
        "them, which are merged into the weights at the end.",
    )
    scope: Literal["block", "model"] = Field(
        "block", description="What learns together: one block, or the whole model."
    )
    training: TrainingOptions = Field(
        default_factory=_default_training,
        description="Block by block, steps are a block's and a batch counts calibration batches "
        "(200 steps of 2 by default); of the whole model it counts sequences (500 steps of 8).",
    )
    lora: LoraOptions | None = Field(
        None, description="With train: lora, the adapters; rank 16 and alpha 32 by default."
    )
    norms: bool = Field(
        True,
        description="Norms and biases of the blocks that patterns reach learn too; they are all "
        "that learns where every linear is rounded.",
    )
    outer: bool = Field(
        False,
        description="With scope model: embeddings, final norm and head learn too, in full.",
    )
    distillation: DistillationOptions | None = Field(
        None,
        description="With scope model, what is learned from; by default the uncompressed model's "
        "predictions alone (labels: 0, logits: 1). layers are blocks of the compressed model.",
    )
    teacher: Literal["auto", "live", "cached"] = Field(
        "auto",
        description="With scope model: live keeps the uncompressed model in memory, cached asks it "
        "once and keeps what it predicts on the disk; auto is cached where no hidden states are "
        "compared and each sequence is seen twice or more.",
    )
    top_k: int = Field(
        64,
        ge=1,
        description="Of a cached teacher: the likeliest tokens of each position that are told "
        "apart; all others count as one.",
    )

    @model_validator(mode="after")
    def _consistent(self):
        whole = {"outer": self.outer, "distillation": self.distillation is not None,
                 "teacher": self.teacher != "auto"}  # fmt: skip
        given = [name for name, there in whole.items() if there]
        if self.scope == "block" and given:
            raise ValueError(f"{given[0]} needs scope: model; blocks learn the teacher's outputs")
        if self.train == "full" and self.lora is not None:
            raise ValueError("lora needs train: lora")
        if not (self.learned_from.logits or self.learned_from.hidden):
            raise ValueError("a distillation needs a weight of logits or hidden above 0")
        if self.teacher == "cached" and self.learned_from.hidden:
            raise ValueError("a cached teacher has no hidden states: set teacher: live")
        return self

    @property
    def learned_from(self) -> DistillationOptions:
        return self.distillation or _PREDICTIONS

    @property
    def adapted(self) -> LoraOptions | None:
        """The adapters; None where the weights learn."""
        return (self.lora or LoraOptions()) if self.train == "lora" else None

    def check(self, anatomy: Anatomy, outline: Outline) -> None:
        super().check(anatomy, outline)
        reached = [
            (f"{block.anatomy.path}.{name}", block.linears[name])
            for block in outline.blocks
            for site in block.anatomy.sites
            for name in self.targets(block.anatomy, site)
        ]
        if self.train == "lora":
            for label, linear in reached:
                _check_mergeable(linear, label)
        if not self.norms and not self.outer and not any(_learns(x) for _, x in reached):
            raise CompressError(
                "something that can learn",
                "linears that are all rounded or of forms that cannot be taken apart",
                "Set norms: true, or put distill before the step that rounds",
            )
        check_compared(self.learned_from, len(outline.blocks))
        if self.scope == "model" and not outline.predicts:
            raise CompressError(
                "a model with a head, whose predictions are learned",
                f"a {anatomy.model_type} without the head of a language model or of labels",
                "Use scope: block, which learns from hidden states",
            )

    def predict(self, outline: Outline) -> Outline:
        return outline

    def passes(self) -> tuple[Pass, ...]:
        place = self.sites
        if self.scope == "block":
            learn = Learn(self.learn_block, self.training, self._learning_bytes)
            return (Stream((place, learn), targets="original", settle=self.merge),)
        # The teacher goes forwards only.
        options = ((self.training, 4 / 3),)
        outer = {"keep_outer": self.keep_outer} if self.outer else {}
        return (
            TrainModel(
                place, self.learn_model, self.keep, options, self._learning_bytes, teacher=True,
                disk=self._cache_bytes, **outer,
            ),
            Stream(
                (place,), inputs=False, settle=self.merge,
                outer=self.change_outer if self.outer else None,
            ),
        )  # fmt: skip

    def solve(self, work: SiteWork) -> None:
        """Put adapters in the places of a site's linears, and in what was learned so far."""
        if self.adapted is not None:
            for path in plain_linears(work.block, work.names):
                seed = derive_seed(work.seed, work.label(path))
                work.replace(path, Adapter(work.linear(path), self.adapted, seed))
        restore(work.block, work.learned)

    def merge(self, block: nn.Module) -> None:
        """Take adapters out, what they learned merged into the weights."""
        for path, adapter in adapters(block).items():
            block.set_submodule(path, adapter.merge())

    def learn_block(self, work: BlockWork) -> None:
        learn_block(work, self._learning(work.block, work.anatomy), self.training)

    def learn_model(self, work: ModelWork) -> None:
        chosen: dict[str, nn.Parameter] = {}
        for anatomy in work.anatomy.blocks:
            block = work.model.get_submodule(anatomy.path)
            found = self._learning(block, anatomy)
            chosen |= {f"{anatomy.path}.{name}": p for name, p in found.items()}
        if self.outer:
            chosen |= {
                name: p
                for name, p in work.model.named_parameters()
                if work.anatomy.is_outer(name) and p.is_floating_point()
            }
        teaching = Teaching(self.learned_from, self.teacher, self.top_k)
        learn_model(work, chosen, self.training, teaching)

    def _learning(self, block: nn.Module, anatomy: BlockAnatomy) -> dict[str, nn.Parameter]:
        names = [name for site in anatomy.sites for name in self.targets(anatomy, site)]
        return learning(block, names, self.train == "full", self.norms)

    def keep(self, block: nn.Module) -> dict[str, torch.Tensor]:
        """What has learned in a block, whose adapters are taken out."""
        learned = _learned(block)
        for path, adapter in adapters(block).items():
            block.set_submodule(path, adapter.inner)
        return learned

    def keep_outer(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """What has learned outside the blocks."""
        anatomy = anatomy_of(model)
        return {n: t for n, t in _learned(model).items() if anatomy.is_outer(n)}

    def change_outer(self, work: OuterWork) -> None:
        restore(work.model, work.learned)

    def _cache_bytes(self, sequences: int, length: int) -> int:
        teaching = Teaching(self.learned_from, self.teacher, self.top_k)
        cached = teaching.cached(sequences, self.training, alive=None)
        return cache_bytes(sequences, length, self.top_k) if cached else 0

    def _learning_bytes(self, shapes: Shapes) -> int:
        weights = sum(out * width for out, width in shapes)
        if self.adapted is None:
            # Gradient, two averages of Adam; the mask of zeros; the weight in the products' type.
            # Block by block also the start and the best so far.
            copies = 8 if self.scope == "block" else 0
            return (12 + 1 + 2 + copies) * weights
        thin = sum(self.adapted.rank * (out + width) for out, width in shapes)
        # The same of the adapters. A weight with zeros is summed up with what is added to it: the
        # mask, the sum and its gradient, and a temporary of the largest.
        largest = max((out * width for out, width in shapes), default=0)
        return 28 * thin + (1 + 4 + 2) * weights + 12 * largest


def _learned(module: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().cpu() for n, p in module.named_parameters() if p.requires_grad}


def _learns(linear: LinearOutline) -> bool:
    return not linear.quantized and bool(linear.roundable)


def _check_mergeable(linear: LinearOutline, label: str) -> None:
    """Refuse an adapter beside what it could not become part of."""
    if linear.quantized:
        raise CompressError(
            "linears in floating point, into which an adapter can be merged exactly",
            f"{label}, whose weights are on a grid, which an adapter would take them off",
            "Exclude it, put distill before the step that rounds, or use train: full, which leaves "
            "rounded weights alone and trains norms and biases",
        )
    if linear.weights and not linear.matrices:
        raise CompressError(
            "linears, or layers made of linears, into which an adapter can be merged",
            f"a layer of kind {linear.layer} at {label}", "Exclude it, or use train: full",
        )  # fmt: skip
