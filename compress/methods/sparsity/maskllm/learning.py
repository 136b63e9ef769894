"""How masks learn: from a block's outputs or from the language model's loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from compress.generators.description import is_masked_generator
from compress.methods.learning import BlockWork, ModelWork
from compress.methods.sparsity.maskllm.best_seen import BestSeen, choices, choose, split_held_out
from compress.methods.sparsity.maskllm.masks import Draw, linear_schedule, masked_linears, set_mode
from compress.models.replay import BlockCall
from compress.system.activations import Activations
from compress.train import Moment, TokenSource, TrainingOptions, fit
from compress.train.generator import GeneratorLoss
from compress.train.language import DistillationOptions, LanguageLoss, relative_error
from compress.train.source import Indices


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


class BlockOutputs(nn.Module):
    """A block and what it is to return: a module whose forward is the relative error.

    The error of a token is |y - y'|^2 / |y|^2, averaged over tokens: the next block normalises each
    token by its length, and a plain mean would see only the few tokens of huge norm.
    """

    def __init__(
        self, block: nn.Module, inputs: Activations, targets: Activations, calls: list[BlockCall]
    ) -> None:
        super().__init__()
        self.block, self._inputs, self._targets, self._calls = block, inputs, targets, calls

    @property
    def device(self) -> torch.device:
        return next(self.block.parameters()).device

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        device, total = self.device, 0.0
        for index in indices.tolist():
            call, target = self._calls[index], self._targets.read(index).to(device)
            output = call(self.block, self._inputs.read(index).to(device))
            total = total + relative_error(call.tokens(output), call.tokens(target))
        return total / len(indices)


def learn_on_block(work: BlockWork, schedule: MaskSchedule, options: TrainingOptions) -> None:
    """Learn the masks of one block's masked linears from its outputs.

    The block keeps the masks that were best on held-out batches: those it came with, those at the
    end, or some in between. Metrics: relative error on held-out batches ``before``, at the ``end``
    of learning and ``after`` all (of the masks that are kept), and the share of groups that
    ``changed``.
    """
    linears = masked_linears(work.block)
    if not linears:
        return  # a block that the step leaves out
    outputs = BlockOutputs(work.block, work.inputs, work.targets, work.calls)
    learned, held = split_held_out(len(work.inputs))
    best = BestSeen(lambda: _error(outputs, linears, held), lambda: choices(linears), options.steps)
    start = best.state

    def loss(module: nn.Module, batch: dict, moment: Moment):
        best.before(moment.step, moment.micro)
        set_mode(linears, schedule.draw(moment))
        for linear in linears.values():
            linear.hold()
        error = module(batch["indices"])
        return error - schedule.reward(linears, moment), {"error": float(error.detach())}

    parameters = [linear.logits for linear in linears.values()]
    _fit_block(work, outputs, loss, parameters, options, learned)
    end = best.look()
    choose(linears, best.state)
    changed = sum(int((best.state[n] != start[n]).sum()) for n in start)
    work.metrics |= {
        "masks.before": best.first, "masks.end": end, "masks.after": best.error,
        "masks.changed": changed / sum(s.numel() for s in start.values()),
    }  # fmt: skip
    _hold_hard(linears)


def tune_on_block(work: BlockWork, options: TrainingOptions) -> None:
    """Train the kept weights of one block on its outputs; the masks stay.

    Of the weights, too, those are kept that were best on held-out batches. Metrics: relative error
    on held-out batches ``before``, at the ``end`` of tuning and ``after`` all.
    """
    linears = masked_linears(work.block)
    if not linears:
        return
    outputs = BlockOutputs(work.block, work.inputs, work.targets, work.calls)
    for linear in linears.values():
        linear.open_weight()
    parameters = [linear.kept for linear in linears.values()]

    learned, held = split_held_out(len(work.inputs))
    best = BestSeen(
        lambda: _error(outputs, linears, held),
        lambda: [p.detach().clone() for p in parameters],
        options.steps,
    )

    def loss(module: nn.Module, batch: dict, moment: Moment):
        best.before(moment.step, moment.micro)
        for linear in linears.values():
            linear.hold()
        error = module(batch["indices"])
        return error, {"error": float(error.detach())}

    _fit_block(work, outputs, loss, parameters, options, learned)
    end = best.look()
    for parameter, value in zip(parameters, best.state, strict=True):
        parameter.data.copy_(value)
    work.metrics |= {
        "tuning.before": best.first, "tuning.end": end, "tuning.after": best.error,
    }  # fmt: skip
    _hold_hard(linears)


def _fit_block(
    work: BlockWork,
    outputs: BlockOutputs,
    loss: Callable,
    parameters: list[nn.Parameter],
    options: TrainingOptions,
    learned: int,
) -> None:
    """Train on the first ``learned`` calibration batches."""
    fit(
        outputs,
        loss,
        Indices(learned),
        options,
        parameters=parameters,
        seed=work.seed,
        guard=work.guard,
        device=work.device,
        auto=work.precision,
    )


def _error(outputs: BlockOutputs, linears: dict, batches: list[int]) -> float:
    """Of the most probable masks, in float32 also while learning computes in 16 bits."""
    _hold_hard(linears)
    with torch.no_grad(), torch.autocast(outputs.device.type, enabled=False):
        return float(outputs(torch.tensor(batches)))


def _hold_hard(linears: dict) -> None:
    set_mode(linears, "hard")
    with torch.no_grad():
        for linear in linears.values():
            linear.hold()


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
    before = {name: linear.logits.detach().max(0).indices for name, linear in linears.items()}

    def draw(moment: Moment) -> torch.Tensor | float:
        set_mode(linears, schedule.draw(moment))
        return schedule.reward(linears, moment)

    parameters = [linear.logits for linear in linears.values()]
    _fit_model(work, linears, draw, parameters, options, distillation, "masks")
    changed = sum(int((m.logits.max(0).indices != before[n]).sum()) for n, m in linears.items())
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
    parameters = [linear.open_weight() for linear in linears.values()]

    def draw(_moment: Moment) -> float:
        set_mode(linears, "hard")
        return 0.0

    _fit_model(work, linears, draw, parameters, options, distillation, "tuning")


def _fit_model(
    work: ModelWork,
    linears: dict,
    draw: Callable[[Moment], torch.Tensor | float],
    parameters: list[nn.Parameter],
    options: TrainingOptions,
    distillation: DistillationOptions | None,
    what: str,
) -> None:
    """Train ``parameters``; ``draw`` sets the linears' masks and returns what the loss is less."""
    if is_masked_generator(work.model.config):
        language = GeneratorLoss(work.model, distillation)
    else:
        language = LanguageLoss(work.model, work.anatomy, distillation)

    def loss(_module: nn.Module, batch: dict, moment: Moment):
        batch, teacher = language.prepare(batch, moment), None
        if distillation is not None:
            set_mode(linears, "dense")
            with torch.no_grad():
                teacher = language.observe(batch)
        reward = draw(moment)
        value, figures = language(batch, teacher)
        return value - reward, figures

    try:
        result = fit(
            work.model,
            loss,
            _windows(work.batches),
            options,
            parameters=parameters,
            folder=work.folder,
            seed=work.seed,
            name=what,
            progress=work.progress,
            guard=work.guard,
            device=work.device,
            auto=work.precision,
        )
    finally:
        set_mode(linears, "hard")
    last = result.history[-max(1, options.steps // 10) :]
    work.metrics[f"{what}.loss"] = sum(line["loss"] for line in last) / len(last)


def _windows(batches: list[dict[str, torch.Tensor]]) -> TokenSource:
    """Calibration batches, one after the other, as windows of one source; short ones are padded."""
    longest = max(b["input_ids"].shape[1] for b in batches)

    def joined(tensors: list[torch.Tensor], padding: int) -> torch.Tensor:
        wide = [nn.functional.pad(t, (0, longest - t.shape[1]), value=padding) for t in tensors]
        return torch.cat(wide).cpu()

    ids = [b["input_ids"] for b in batches]
    labels = [b["labels"] for b in batches if "labels" in b]
    seen = [b.get("attention_mask", torch.ones_like(b["input_ids"])) for b in batches]
    padded = any("attention_mask" in b or b["input_ids"].shape[1] < longest for b in batches)
    return TokenSource(
        joined(ids, 0),
        joined(labels, -100) if len(labels) == len(batches) else None,
        joined(seen, 0) if padded else None,
    )
