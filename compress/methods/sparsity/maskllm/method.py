"""MaskLLM: N:M masks learned by gradients, the weights themselves left as they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import nn

from compress.checkpoint.mask_file import PackedPattern, pack_mask, unpack_mask
from compress.errors import CompressError
from compress.linear.algebra import refit_masked
from compress.linear.pattern import Pattern
from compress.linear.statistics import GRAM, NOTHING
from compress.linear.sweep import sweep_work
from compress.methods.passes import Effort, Learn, Pass, Shapes, Sites, Stream, TrainModel
from compress.methods.sparsity.base import ZeroingMethod
from compress.methods.sparsity.maskllm.learning import (
    MaskSchedule,
    learn_on_block,
    learn_on_model,
    tune_on_block,
    tune_on_model,
)
from compress.methods.sparsity.maskllm.masks import MaskedLinear, initial_logits, masked_linears
from compress.methods.sparsity.maskllm.priors import (
    PRIORS,
    check_prior_file,
    prior_mask,
    prior_statistic,
)
from compress.methods.work import SiteWork
from compress.models.anatomy import Anatomy, Site
from compress.models.outline import Outline
from compress.train.language import DistillationOptions
from compress.train.moment import derive_seed
from compress.train.options import TrainingOptions
from compress.train.reconstruction import BlockWork
from compress.train.whole import ModelWork

_MOST_CANDIDATES = 70  # 4:8, the largest pattern of the literature
_DAMPING = 1e-3
_KEPT = ".kept"  # beside a linear's mask: its weights as tuning left them


def _default_training(given: dict[str, Any]) -> TrainingOptions:
    """Of the whole model: table 7 of the paper. Of a block, whose steps cost a thousandth: a higher
    rate, and no floor under Adam's quotient, since gradients are as small as the block's error."""
    if given.get("scope") == "model":
        return TrainingOptions(
            steps=2000, batch=256, learning_rate=5e-4, final_ratio=0.1, weight_decay=0.1,
            betas=(0.9, 0.95), eps=1e-5, clip=1.0,
        )  # fmt: skip
    return TrainingOptions(
        steps=200, batch=2, learning_rate=3e-3, final_ratio=0.1, betas=(0.9, 0.95), clip=None
    )


class MaskLLM(ZeroingMethod):
    """Learn which N of every M weights to keep; the kept ones stay bit for bit what they are.

    ``scope: model`` is the paper's: the masks of all layers learn together from the language
    model's loss, which needs the whole model, its gradients and a GPU for anything large.
    ``scope: block`` streams: the masks of each block learn to reproduce what the uncompressed model
    computes there, which needs one block in memory; ``end_to_end`` may follow it, starting from
    those masks.
    """

    name: ClassVar[str] = "maskllm"
    summary: ClassVar[str] = "learn N:M masks by gradients, block by block or on the whole model"
    source: ClassVar[str] = "Fang et al. 2024, arXiv 2409.17481, eq. 4-10"

    pattern: str = Field("2:4", description="N:M, at most 70 ways to choose (4:8).")
    scope: Literal["block", "model"] = Field(
        "block", description="What learns together: the masks of one block, or of the whole model."
    )
    prior: str = Field(
        "search",
        description="Mask to start from: magnitude, wanda, sparsegpt (its mask only), search (the "
        "least output error, by local search), none, or a masks.safetensors of an earlier run.",
    )
    prior_batches: int = Field(
        128,
        gt=0,
        description="Calibration batches, the first ones, that the prior is chosen on.",
    )
    alpha: float = Field(
        3.0, ge=0, description="Strength of the prior (eq. 10); from 5 on it is followed exactly."
    )
    logit_std: float = Field(0.01, gt=0, description="Spread of the logits at the start.")
    kappa: tuple[float, float] = Field(
        (100.0, 500.0), description="Scale of the logits against the noise, from start to end."
    )
    tau: tuple[float, float] = Field(
        (4.0, 0.05), description="Temperature of the Gumbel softmax, from start to end."
    )
    regularization: float | None = Field(
        None,
        ge=0,
        description="Reward for the squared norm of the kept weights (eq. 8), falling to 0; by "
        "default 1e-5 for the language-model loss and 0 block by block.",
    )
    training: TrainingOptions | None = Field(
        default_factory=_default_training,
        description="Of the scope chosen; null takes the prior as it is. Block by block, steps are "
        "a block's and a batch counts calibration batches (200 steps by default); of the whole "
        "model, by default as in the paper (2,000 steps of 256 sequences).",
    )
    targets_from: Literal["dense", "prefix"] = Field(
        "dense",
        description="What a block reproduces: the uncompressed model's output there, or what the "
        "uncompressed block makes of the inputs that reach it now.",
    )
    end_to_end: TrainingOptions | None = Field(
        None, description="With scope block: train the whole model afterwards, from those masks."
    )
    distillation: DistillationOptions | None = Field(
        None,
        description="Whole model, masks and tuning: learn from the uncompressed model's outputs "
        "as well.",
    )
    least_squares: bool = Field(
        False,
        description="Once the masks are final, refit the kept weights of each layer in closed "
        "form. The paper leaves weights alone.",
    )
    tuning: TrainingOptions | None = Field(
        None,
        description="Once the masks are final, train the kept weights; block by block a batch "
        "counts calibration batches, of the whole model sequences.",
    )
    tuning_scope: Literal["block", "model"] = Field(
        "block",
        description="What tuning trains together: the kept weights of one block, on the "
        "uncompressed block's outputs, or of the whole model, on the language model's loss and "
        "the distillation.",
    )

    @field_validator("kappa", "tau")
    @classmethod
    def _positive(cls, value: tuple[float, float]) -> tuple[float, float]:
        if min(value) <= 0:
            raise ValueError("two positive numbers, at the start and at the end")
        return value

    @field_validator("pattern")
    @classmethod
    def _pattern_parses(cls, value: str) -> str:
        try:
            pattern = Pattern.parse(value)
        except CompressError as error:
            raise ValueError(
                f"{error.expected}, got {value!r}: masks are learned group by group"
            ) from None
        return str(pattern)

    @model_validator(mode="after")
    def _consistent(self):
        if self.parsed.candidates > _MOST_CANDIDATES:
            raise ValueError(
                f"pattern {self.pattern} has {self.parsed.candidates} masks a group; at most "
                f"{_MOST_CANDIDATES} (4:8) can be learned"
            )
        if self.scope == "model" and self.end_to_end is not None:
            raise ValueError("end_to_end follows scope: block; for scope: model set training")
        if self.tuning_scope == "model" and (self.tuning is None or self.least_squares):
            raise ValueError("tuning_scope: model needs tuning, and least_squares would undo it")
        if self.distillation is not None and not self._trains_model:
            raise ValueError(
                "distillation needs scope: model, end_to_end or tuning_scope: model; blocks always "
                "distil"
            )
        if self.prior not in PRIORS and Path(self.prior).suffix != ".safetensors":
            raise ValueError(
                f"prior {self.prior!r} is neither a .safetensors file nor one of "
                + ", ".join(PRIORS)
            )
        if self.parsed.candidates < 2 and (self.training or self.end_to_end):
            raise ValueError(
                f"pattern {self.pattern} keeps every weight, which leaves nothing to learn; N must "
                "be below M, as in 2:4"
            )
        if self._trains_model:
            self._check_packed()
        if self.prior == "none" and self.training is None:
            raise ValueError("prior: none with training: null would leave the masks to chance")
        return self

    def _check_packed(self) -> None:
        """Refuse patterns whose masks cannot be kept between two passes over the blocks."""
        try:
            PackedPattern(self.parsed.n, self.parsed.m)
        except CompressError as error:
            raise ValueError(
                f"pattern {self.pattern} with scope: model, end_to_end or tuning_scope: model, "
                f"which keep masks packed and need {error.expected}; choose another pattern, or "
                "learn block by block alone"
            ) from None

    @property
    def schedule(self) -> MaskSchedule:
        """How masks are drawn while the blocks, or with scope ``model`` the model, learn."""
        default = 1e-5 if self.scope == "model" else 0.0
        given = self.regularization
        return MaskSchedule(self.kappa, self.tau, default if given is None else given)

    @property
    def _whole(self) -> TrainingOptions | None:
        """Of the masks of the whole model."""
        return self.training if self.scope == "model" else self.end_to_end

    @property
    def _learns_masks(self) -> bool:
        return self.training is not None or self.end_to_end is not None

    @property
    def _tuned_whole(self) -> TrainingOptions | None:
        return self.tuning if self.tuning_scope == "model" else None

    @property
    def _trains_model(self) -> bool:
        return self._whole is not None or self._tuned_whole is not None

    def passes(self) -> tuple[Pass, ...]:
        """Blocks learn and change in one pass, or learn, train together, and then change."""
        batches = 0 if prior_statistic(self.prior) == NOTHING else self.prior_batches
        install = replace(self.sites, batches=batches)
        learn: list[Sites | Learn] = [install]
        if self.scope == "block" and self.training is not None:
            learn.append(Learn(self.learn_block, self.training, self._learning_bytes))
        finish: list[Sites | Learn] = []
        if self.least_squares:
            finish.append(Sites(self.targets, self.update, _gram))
        if self.tuning is not None and self.tuning_scope == "block":
            finish.append(Learn(self.tune_block, self.tuning, self._learning_bytes))
        if not self._trains_model:
            return (Stream((*learn, *finish), targets=self.targets_from, settle=self._settle),)
        learns = len(learn) > 1
        restore = Sites(self.targets, self.solve)
        shares = 1 if self.distillation is None else 4 / 3  # the teacher goes forwards only
        whole = tuple((o, shares) for o in (self._whole, self._tuned_whole) if o is not None)
        return (
            Stream(
                tuple(learn), inputs=learns or batches > 0, batches=None if learns else batches,
                targets=self.targets_from, keep=self._take,
            ),
            TrainModel(restore, self.learn_model, self._take, whole, self._learning_bytes),
            Stream(
                (restore, *finish), inputs=bool(finish), targets=self.targets_from,
                settle=self._settle,
            ),
        )  # fmt: skip

    def files(self) -> tuple[Path, ...]:
        return () if self.prior in PRIORS else (Path(self.prior),)

    def check(self, anatomy: Anatomy, outline: Outline) -> None:
        super().check(anatomy, outline)
        shapes = {}
        for block in outline.blocks:
            for site in block.anatomy.sites:
                for name in self.targets(block.anatomy, site):
                    linear, label = block.linears[name], f"{block.anatomy.path}.{name}"
                    if linear.layer:
                        raise CompressError(
                            "linears that hold one matrix",
                            f"a layer of kind {linear.layer} at {label}",
                            f"Learn masks before the step that made the {linear.layer}, or exclude "
                            "it",
                        )
                    shapes[label] = (linear.out_features, linear.in_features)
        check_prior_file(self.prior, shapes, self.parsed)
        if self._trains_model and not outline.predicts:
            raise CompressError(
                "a model with a head, whose loss the masks learn from",
                f"a {anatomy.model_type} without the head of a language model or of labels",
                "Use scope: block, which learns from hidden states",
            )

    def _learning_bytes(self, shapes: Shapes) -> int:
        weights = sum(out * width for out, width in shapes)
        logits = weights * self.parsed.candidates // self.parsed.m
        # Logits, gradient, two averages of Adam, shares and a temporary; the masked weight and its
        # gradient.
        masks = 6 * logits + 2 * weights
        # The same of the kept weights, which need neither noise nor a start.
        tuning = logits + 6 * weights
        return 4 * max(
            masks if self._learns_masks else 0, tuning if self.tuning is not None else 0, logits
        )

    def solving_work(self, shapes: Shapes) -> Effort:
        if self.prior == "sparsegpt":
            return Effort(*sweep_work(shapes))
        if self.prior == "search":
            # A few sweeps of products of M columns each, which run at the speed of memory.
            return Effort(moved=5.0 * sum(out * width**2 for out, width in shapes))
        return super().solving_work(shapes)

    def statistic(self, site: Site) -> str:
        return prior_statistic(self.prior)

    def solve(self, work: SiteWork) -> None:
        """Put masked linears, with the prior or what was learned so far, in the linears' places."""
        learning = self._learns_masks
        for name in work.names:
            mask = self._mask(work, name)
            inner, label = work.linear(name), work.label(name)
            generator = torch.Generator(inner.weight.device).manual_seed(derive_seed(label))
            logits = initial_logits(
                self.parsed,
                inner.weight.numel() // self.parsed.m,
                prior=mask,
                alpha=self.alpha,
                std=self.logit_std,
                generator=generator,
                # What earlier stages learned, or a prior that is all there is, is not to be lost.
                exact=mask is not None and (bool(work.learned) or not learning),
                device=inner.weight.device,
            )
            stream = derive_seed(label)
            linear = MaskedLinear(inner, self.parsed, logits, stream)
            if name + _KEPT in work.learned:
                linear.open_weight(work.learned[name + _KEPT].to(inner.weight.device))
            work.replace(name, linear)
            linear.hold()

    def _mask(self, work: SiteWork, name: str) -> torch.Tensor | None:
        if name in work.learned:
            shape = tuple(work.weight(name).shape)
            packed = PackedPattern(self.parsed.n, self.parsed.m)
            return unpack_mask(work.learned[name], packed, shape).to(work.weight(name).device)
        statistics = work.statistics.get(name)
        return prior_mask(self.prior, work.weight(name), statistics, self.parsed, work.label(name))

    def learn_block(self, work: BlockWork) -> None:
        learn_on_block(work, self.schedule, self.training)

    def learn_model(self, work: ModelWork) -> None:
        if self._whole is not None:
            learn_on_model(work, self.schedule, self._whole, self.distillation)
            if work.folder is not None:  # checkpoints of the tuning are of another training
                work.folder = work.folder / "tuning"
        if self._tuned_whole is not None:
            tune_on_model(work, self._tuned_whole, self.distillation)

    def update(self, work: SiteWork) -> None:
        for name in work.names:
            linear = work.linear(name)
            gram = work.statistics[name].gram
            # A weight that was zero before the step stays it, kept or not.
            mask = linear.mask() & (linear.dense != 0)
            linear.open_weight(refit_masked(linear.dense, gram, mask, _DAMPING))
            linear.hold()

    def tune_block(self, work: BlockWork) -> None:
        tune_on_block(work, self.tuning)

    def _take(self, block: nn.Module) -> dict[str, torch.Tensor]:
        """Masks and kept weights of a block, whose linears are put back as they were."""
        learned = {}
        for path, linear in masked_linears(block).items():
            packed = PackedPattern(self.parsed.n, self.parsed.m)
            learned[path] = pack_mask(linear.mask(), packed).cpu()
            if linear.kept is not None:
                learned[path + _KEPT] = linear.kept.detach().cpu()
            block.set_submodule(path, linear.settle(dense=True))
        return learned

    def _settle(self, block: nn.Module) -> None:
        """Put the linears of a block back with their zeros."""
        for path, linear in masked_linears(block).items():
            block.set_submodule(path, linear.settle())


def _gram(_site: Site) -> str:
    return GRAM
