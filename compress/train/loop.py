"""The one training loop: any module, any loss, one process or several, resumable to the bit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.errors import CompressError
from compress.system import processes
from compress.system.progress import Progress
from compress.train.folder import CheckpointFolder, begun_precision
from compress.train.moment import Moment, derive_seed
from compress.train.options import Precision, TrainingOptions, compute_dtype, learning_rate
from compress.train.parameters import Group, Trained, named_groups
from compress.train.recompute import recomputing
from compress.train.source import BatchSource, Order, sample_digest

Batch = dict[str, torch.Tensor]
_HELD = "held."  # in front of the names of tensors that the loss changes
_FIRST_SCALE = 2.0**12  # of float16 losses; torch's 2**16 overflows in the first steps
LossFunction = Callable[[nn.Module, Batch, Moment], tuple[torch.Tensor, dict[str, float]]]


@dataclass(frozen=True)
class TrainingResult:
    """What a training left besides the module's parameters.

    Attributes:
        steps: done, those before an interruption among them.
        history: a line a step: step, loss, lr, tokens_per_s, seconds (since the training began),
            norm (of the gradient, before clipping, where it is clipped), and the loss's figures.
        seconds: spent in steps, those before an interruption among them.
    """

    steps: int
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def last_loss(self) -> float:
        """The mean loss of the last tenth of the steps."""
        last = self.history[-max(1, self.steps // 10) :]
        return sum(line["loss"] for line in last) / len(last)


def fit(
    module: nn.Module,
    loss: LossFunction,
    source: BatchSource,
    options: TrainingOptions,
    *,
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]] | None = None,
    folder: Path | None = None,
    seed: int = 0,
    name: str = "train",
    progress: Progress | None = None,
    guard: Callable[[], None] = lambda: None,
    device: torch.device | str | None = None,
    auto: Precision = "auto",
    held: Mapping[str, torch.Tensor] | None = None,
) -> TrainingResult:
    """Train a module in place with AdamW.

    The result is a function of module, source, options and seed: the order of examples and all
    random numbers are derived from the seed and the step, so an interrupted training that is called
    again with its folder ends in the same bytes as an undisturbed one. Several processes (see
    :mod:`compress.system.processes`) share the micro-batches of a step, process r taking r, r + W,
    ..., and average gradients; the result then differs from one process's by the order of sums
    only.

    The module keeps its training or evaluation mode: dropout acts where the caller has said
    ``module.train()``. Torch's global generators are left as they were.

    Args:
        module: on the device that it is to be trained on. It may be sharded over the processes
            (``torch.distributed.fsdp.fully_shard``, or prepared by accelerate with FSDP version 2).
        loss: called with module, micro-batch and moment; returns the mean loss of the micro-batch
            (a scalar; micro-batches count equally) and figures for the history.
        source: of examples.
        options: of the training.
        parameters: what to train: parameters, or groups of them with ``lr`` and ``weight_decay`` of
            their own; by default all that require gradients.
        folder: for checkpoints and history; None where nothing is durable. All processes see it.
        seed: of everything random.
        name: of the task, for the progress bar.
        progress: where to tell how far it is.
        guard: called before each step; raises when a limit is exceeded.
        device: where micro-batches go; by default where the parameters are.
        auto: what ``precision: auto`` means, where that was settled when a run began; by default
            the machine is asked.
        held: tensors that the loss changes in place, by name, and that later steps
            depend on: they are part of checkpoints. Several processes change them alike.

    Returns:
        the history. With ``options.ema`` the module's parameters are the average.

    Raises:
        CompressError: a loss that is not finite, a folder of another training, micro-batches that
            do not divide among the processes, or what the parts raise.
    """
    groups = named_groups(module, parameters)
    place = torch.device(device or next(module.parameters()).device)
    if options.precision == "auto":
        # A training that was begun on another machine goes on as it was begun.
        options = options.model_copy(update={"precision": begun_precision(folder) or auto})
    with recomputing(module, options.gradient_checkpointing):
        run = _Run(module, loss, source, options, groups, seed, place, held or {})
        run.resume(Path(folder) if folder is not None else None)
        run.trained.forget_gradients()  # the caller's own, if the module came with some
        cuda = [place] if place.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            for step in range(run.start, options.steps):
                guard()
                line = run.step(step)
                if progress is not None and run.world.rank == 0:
                    note = f"loss {line['loss']:.4g}, {line['tokens_per_s']:,.0f} tokens/s"
                    progress.update(name, step + 1, options.steps, note)
        run.trained.settle()
    return TrainingResult(options.steps, run.history, run.seconds)


class _Run:
    """The state of one training between two steps."""

    def __init__(
        self,
        module: nn.Module,
        loss: LossFunction,
        source: BatchSource,
        options: TrainingOptions,
        groups: list[Group],
        seed: int,
        device: torch.device,
        held: Mapping[str, torch.Tensor],
    ) -> None:
        self.module, self.loss, self.source, self.options = module, loss, source, options
        self.held = held
        self.seed, self.device, self.world = seed, device, processes.world()
        if options.micro_batches % self.world.size:
            raise CompressError(
                f"micro-batches that divide among {self.world.size} processes",
                f"{options.micro_batches} a step",
                "Set micro_batch to batch / processes, or a divisor of it",
            )
        self.trained = Trained(module, groups, options)
        lengths = getattr(source, "lengths", None)
        self.order = Order(len(source), seed, lengths, options.batch)
        self.dtype = compute_dtype(options.precision, device)
        self.scaler = torch.amp.GradScaler(
            device.type, enabled=self.dtype == torch.float16, init_scale=_FIRST_SCALE
        )
        self.sharded = any(hasattr(p, "device_mesh") for p in self.trained.parameters.values())
        self.start, self.seconds = 0, 0.0
        self.history: list[dict[str, Any]] = []
        self.folder: CheckpointFolder | None = None

    def resume(self, folder: Path | None) -> None:
        """Open the folder and take over its last state."""
        if folder is None:
            return
        facts = {
            "options": {
                **self.options.model_dump(exclude={"checkpoint_every"}),
                "precision": str(self.dtype).removeprefix("torch."),
            },
            "seed": self.seed,
            "examples": {"count": len(self.source), "digest": sample_digest(self.source)},
            "shapes": {n: list(p.shape) for n, p in self.trained.parameters.items()},
        }
        if self.world.rank > 0:
            processes.wait_for_all()
        self.folder = CheckpointFolder(folder, facts, writes=self.world.rank == 0)
        if self.world.rank == 0:
            processes.wait_for_all()
        self.start, tensors = self.folder.load()
        self.history = self.folder.history(self.start)
        if self.history:
            self.seconds = self.history[-1]["seconds"]
        if not self.start:
            return
        self.trained.restore(tensors)
        for name, tensor in self.held.items():
            tensor.copy_(tensors[_HELD + name])
        if self.scaler.is_enabled():
            held = self.scaler.state_dict()
            held["scale"] = float(tensors["scaler.scale"])
            held["_growth_tracker"] = int(tensors["scaler.growth"])
            self.scaler.load_state_dict(held)

    def step(self, step: int) -> dict[str, Any]:
        """One optimiser step; returns its line of the history."""
        started = time.perf_counter()
        figures, tokens = self._accumulate(step)
        figures |= self._limit(step, figures["loss"])
        self.trained.update(step, self.scaler)
        elapsed = time.perf_counter() - started
        self.seconds += elapsed
        line = {
            "step": step,
            "lr": learning_rate(self.options, step),
            "tokens_per_s": tokens / elapsed,
            "seconds": self.seconds,
            **figures,
        }
        self.history.append(line)
        if self.folder is not None:
            self.folder.note(line)
            if (step + 1) % self.options.checkpoint_every == 0 or step + 1 == self.options.steps:
                self.folder.save(step + 1, self._state())
        return line

    def _accumulate(self, step: int) -> tuple[dict[str, float], int]:
        """Gradients of all micro-batches; returns the loss with its figures, and tokens seen."""
        count = self.options.micro_batches
        size = self.options.at_once
        # A sharded module averages over the processes by itself.
        weight = (self.world.size if self.sharded else 1) / count
        total: dict[str, torch.Tensor | float] = {}
        tokens = 0
        for micro in range(self.world.rank, count, self.world.size):
            batch = self.source.get(
                self.order.indices(step * self.options.batch + micro * size, size)
            )
            batch = {n: t.to(self.device, non_blocking=True) for n, t in batch.items()}
            tokens += _tokens(batch)
            moment = Moment(step, self.options.steps, self.seed, micro)
            torch.manual_seed(derive_seed(self.seed, step, micro, "torch"))
            with torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32):
                loss, figures = self.loss(self.module, batch, moment)
            self.scaler.scale(loss * weight).backward()
            for name, value in {"loss": loss.detach(), **figures}.items():
                total[name] = total.get(name, 0.0) + value / count
        return self._over_processes(total, tokens)

    def _over_processes(
        self, total: dict[str, torch.Tensor | float], tokens: int
    ) -> tuple[dict[str, float], int]:
        """Add up what the processes have: gradients in place, figures and tokens returned."""
        if self.world.size == 1:
            return {n: float(v) for n, v in total.items()}, tokens
        gradients = self.trained.gradients()
        if not self.sharded:
            processes.sum_over_processes(gradients)
        names = sorted(total)
        values = torch.tensor(
            [*(float(total[n]) for n in names), tokens], dtype=torch.float64, device=self.device
        )
        processes.sum_over_processes([values])
        *sums, tokens = values.tolist()
        return dict(zip(names, sums, strict=True)), int(tokens)

    def _limit(self, step: int, loss: float) -> dict[str, float]:
        """Clip the gradient; returns its norm where it is clipped.

        Raises:
            CompressError: loss or gradient are not finite. The last checkpoint stays as it is.
        """
        if not math.isfinite(loss):
            raise _diverged("loss", loss, step, self.options)
        gradients = self.trained.gradients()
        self.scaler.unscale_(self.trained.optimiser)
        norm = nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        value = float(norm)
        # Steps in which float16 has overflowed are left out by the scaler.
        if not math.isfinite(value) and not self.scaler.is_enabled():
            raise _diverged("norm of the gradient", value, step, self.options)
        if self.options.clip is None:
            return {}
        nn.utils.clip_grads_with_norm_(self.trained.parameters.values(), self.options.clip, norm)
        return {"norm": value}

    def _state(self) -> dict[str, torch.Tensor]:
        state = self.trained.state() | {_HELD + name: t for name, t in self.held.items()}
        if self.scaler.is_enabled():
            scaler = self.scaler.state_dict()
            state["scaler.scale"] = torch.tensor(scaler["scale"])
            state["scaler.growth"] = torch.tensor(scaler["_growth_tracker"])
        return state


def _diverged(what: str, value: float, step: int, options: TrainingOptions) -> CompressError:
    return CompressError(
        f"a finite {what} at step {step}",
        str(value),
        f"Lower learning_rate (now {options.learning_rate:g}), raise warmup (now {options.warmup}) "
        "or set precision: float32; a checkpoint of an earlier step is kept",
    )


def _tokens(batch: Batch) -> int:
    """Positions in a batch: examples times length."""
    ids = batch.get("input_ids", next(iter(batch.values())))
    return math.prod(ids.shape[:2])
