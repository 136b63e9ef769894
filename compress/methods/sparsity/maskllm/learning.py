"""How masks learn: from a block's outputs or from the language model's loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from compress.methods.sparsity.maskllm.masks import (
    Draw,
    MaskedLinear,
    linear_schedule,
    masked_linears,
    set_mode,
)
from compress.models.replay import BlockCall
from compress.train.language import DistillationOptions
from compress.train.moment import Moment
from compress.train.options import TrainingOptions
from compress.train.reconstruction import BlockWork, learn_outputs
from compress.train.whole import ModelWork, learn_language

_TINY = 1e-12  # of squared lengths: a token of zeros has no relative error


@dataclass(frozen=True)
class MaskSchedule:
    """How masks are drawn from the start of training to its end.

    Attributes:
        kappa, tau: see :func:`.soft.masked_weight`; linear in the steps.
        regularization: reward for the squared norm of the kept weights, falling to 0 linearly.
    """

    kappa: tuple[float, float]
    tau: tuple[float, float]
    regularization: float

    def draw(self, moment: Moment) -> Draw:
        return Draw(
            linear_schedule(self.kappa, moment.progress),
            linear_schedule(self.tau, moment.progress),
            moment.number(),
        )

    def reward(self, linears: dict, moment: Moment) -> torch.Tensor | float:
        """The term that is subtracted from the loss (eq. 8)."""
        if not self.regularization:
            return 0.0
        norms = sum(linear.held().float().square().sum() for linear in linears.values())
        return self.regularization * (1 - moment.progress) * norms


def error_of_outputs(output: torch.Tensor, target: torch.Tensor, call: BlockCall) -> torch.Tensor:
    """Half the mean relative error of the tokens, and half that of all tokens together.

    In some block of a trained transformer the first token becomes a hundred times as long as the
    others, and all later attention rests on it (Sun et al. 2024, arXiv 2402.17762). It has to be
    weighed by its length too: of the tokens' mean it is one in hundreds, so that to lose it costs
    next to nothing. And a token's error is relative to the longer of what it is and what it should
    be: else a token that is as long by mistake costs its length squared, ten thousand times what a
    lost one costs, and masks learn to have none.

    Args:
        output, target: states [batch, length, hidden size]. call: knows which of them are padding.
    """
    made, wanted = call.tokens(output), call.tokens(target)
    apart, norm = (made - wanted).square().sum(-1), wanted.square().sum(-1)
    longer = torch.maximum(made.detach().square().sum(-1), norm).clamp_min(_TINY)
    return ((apart / longer).mean() + apart.sum() / norm.sum().clamp_min(_TINY)) / 2


def learn_on_block(work: BlockWork, schedule: MaskSchedule, options: TrainingOptions) -> None:
    """Learn the masks of one block's masked linears from its outputs.

    The block keeps the masks that were best on held-out batches: those it came with, those at the
    end, or some in between. Metrics: the error (:func:`error_of_outputs`) on held-out batches
    ``before``, at the ``end`` of learning and ``after`` all (of the masks that are kept), and the
    share of groups that ``changed``.
    """
    linears = masked_linears(work.block)
    if not linears:
        return  # a block that the step leaves out

    def prepare(moment: Moment) -> torch.Tensor | float:
        set_mode(linears, schedule.draw(moment))
        for linear in linears.values():
            linear.hold()
        return schedule.reward(linears, moment)

    best = learn_outputs(
        work, [linear.logits for linear in linears.values()], options,
        prepare=prepare, settle=lambda: _hold_hard(linears), take=lambda: choices(linears),
        distance=error_of_outputs,
    )  # fmt: skip
    choose(linears, best.state)
    changed = sum(int((best.state[n] != before).sum()) for n, before in best.start.items())
    work.metrics |= best.metrics("masks")
    work.metrics["masks.changed"] = changed / sum(s.numel() for s in best.start.values())
    _hold_hard(linears)


def tune_on_block(work: BlockWork, options: TrainingOptions) -> None:
    """Train the kept weights of one block on its outputs; the masks stay.

    Of the weights, too, those are kept that were best on held-out batches. Metrics: the error
    (:func:`error_of_outputs`) there ``before``, at the ``end`` of tuning and ``after`` all.
    """
    linears = masked_linears(work.block)
    if not linears:
        return
    for linear in linears.values():
        linear.open_weight()

    def prepare(_moment: Moment) -> float:
        for linear in linears.values():
            linear.hold()
        return 0.0

    best = learn_outputs(
        work, [linear.kept for linear in linears.values()], options,
        prepare=prepare, settle=lambda: _hold_hard(linears), distance=error_of_outputs,
    )  # fmt: skip
    work.metrics |= best.metrics("tuning")
    _hold_hard(linears)


def choices(linears: dict[str, MaskedLinear]) -> dict[str, torch.Tensor]:
    """Which mask of each group is the most probable one, uint8 [G] a linear."""
    return {n: m.logits.detach().max(0).indices.byte() for n, m in linears.items()}


def choose(linears: dict[str, MaskedLinear], wanted: dict[str, torch.Tensor]) -> None:
    """Make these masks the most probable ones."""
    for name, linear in linears.items():
        logits, index = linear.logits.detach(), wanted[name].long()[None]
        highest, found = logits.max(0, keepdim=True)
        logits.scatter_(0, found, logits.gather(0, index)).scatter_(0, index, highest)
        linear.drop()


def _hold_hard(linears: dict[str, MaskedLinear]) -> None:
    set_mode(linears, "hard")
    with torch.no_grad():
        for linear in linears.values():
            linear.hold()


@contextmanager
def _masks_off(linears: dict[str, MaskedLinear]) -> Iterator[None]:
    """The dense model; what comes next in training sets its own mode."""
    set_mode(linears, "dense")
    yield


def learn_on_model(
    work: ModelWork,
    schedule: MaskSchedule,
    options: TrainingOptions,
    distillation: DistillationOptions | None,
) -> None:
    """Learn the masks of a whole model from the language model's loss (eq. 8).

    With ``distillation`` the teacher is the same model with its masks off: it costs a forward pass
    and no memory. Metrics: ``masks.loss``, the mean of the last tenth of the steps, and the share
    of groups that ``masks.changed``.
    """
    linears = masked_linears(work.model)
    before = choices(linears)

    def prepare(moment: Moment) -> torch.Tensor | float:
        set_mode(linears, schedule.draw(moment))
        return schedule.reward(linears, moment)

    try:
        work.metrics["masks.loss"] = learn_language(
            work, [linear.logits for linear in linears.values()], options, distillation,
            name="masks", prepare=prepare, teacher=lambda: _masks_off(linears),
        ).last_loss  # fmt: skip
    finally:
        set_mode(linears, "hard")
    changed = sum(int((after != before[n]).sum()) for n, after in choices(linears).items())
    groups = sum(m.logits.shape[1] for m in linears.values())
    work.metrics["masks.changed"] = changed / groups


def tune_on_model(
    work: ModelWork, options: TrainingOptions, distillation: DistillationOptions | None
) -> None:
    """Train the kept weights of a whole model on the language model's loss; the masks stay.

    The teacher of a ``distillation`` is the dense model. Metric: ``tuning.loss``, the mean of the
    last tenth of the steps.
    """
    linears = masked_linears(work.model)

    def prepare(_moment: Moment) -> float:
        set_mode(linears, "hard")
        return 0.0

    try:
        work.metrics["tuning.loss"] = learn_language(
            work, [linear.open_weight() for linear in linears.values()], options, distillation,
            name="tuning", prepare=prepare, teacher=lambda: _masks_off(linears),
        ).last_loss  # fmt: skip
    finally:
        set_mode(linears, "hard")
