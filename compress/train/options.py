"""What the training loop can be told, and the functions of these options that are pure."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from compress.errors import CompressError
from compress.system.precision import fast_bfloat16

Precision = Literal["auto", "float32", "bfloat16", "float16"]
Decay = Annotated[float, Field(ge=0, lt=1)]


class TrainingOptions(BaseModel):
    """Options of :func:`compress.train.fit`; the optimiser is AdamW (arXiv 1711.05101).

    Raises:
        CompressError: ``batch`` is no multiple of ``micro_batch``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    steps: int = Field(ge=1, description="optimiser steps")
    batch: int = Field(32, ge=1, description="examples an optimiser step, over all processes")
    micro_batch: int | None = Field(
        None, ge=1, description="examples that are in memory at once; all of a step where not given"
    )
    learning_rate: float = Field(1e-3, gt=0, description="the highest of the schedule")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="of the learning rate behind the warm-up"
    )
    warmup: int = Field(0, ge=0, description="steps in which the learning rate rises linearly")
    final_ratio: float = Field(
        0.0, ge=0, le=1, description="learning rate at the end, as a share of the highest"
    )
    weight_decay: float = Field(0.0, ge=0, description="of parameters with at least two dimensions")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="decay of Adam's two averages")
    eps: float = Field(1e-8, gt=0, description="keeps Adam's quotient finite")
    clip: float | None = Field(1.0, gt=0, description="largest norm of the gradient; null for none")
    precision: Precision = Field(
        "auto", description="of products; auto is 16 bits where those are measured to be fast"
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute blocks in the backward pass instead of storing them"
    )
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of an average of the parameters, which is the result"
    )
    checkpoint_every: int = Field(100, ge=1, description="steps between two checkpoints")

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> TrainingOptions:
        if self.batch % (self.micro_batch or self.batch):
            raise CompressError(
                "a batch that is a multiple of micro_batch",
                f"batch {self.batch} and micro_batch {self.micro_batch}",
                "Change one of them",
            )
        return self

    @property
    def at_once(self) -> int:
        """Examples in memory at once, in each process."""
        return self.micro_batch or self.batch

    @property
    def micro_batches(self) -> int:
        """Micro-batches an optimiser step, over all processes."""
        return self.batch // self.at_once


def learning_rate(options: TrainingOptions, step: int) -> float:
    """The learning rate of a step, counted from 0.

    It rises linearly to the highest, which step ``warmup`` has, and falls from there so that it
    would reach ``final_ratio`` of it at step ``steps``.
    """
    if step < options.warmup:
        return options.learning_rate * (step + 1) / (options.warmup + 1)
    if options.schedule == "constant":
        return options.learning_rate
    done = (step - options.warmup) / max(1, options.steps - options.warmup)
    fall = (1 + math.cos(math.pi * done)) / 2 if options.schedule == "cosine" else 1 - done
    return options.learning_rate * (options.final_ratio + (1 - options.final_ratio) * fall)


def compute_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of matrix products on a device; ``auto`` is what :func:`auto_precision` says.

    Raises:
        CompressError: float16 on a CPU, whose small gradients would vanish.
    """
    if precision == "auto":
        precision = auto_precision(device)
    if precision == "float16" and device.type != "cuda":
        raise CompressError(
            "a GPU for training in float16", f"the device {device}", "Set precision: auto"
        )
    return getattr(torch, precision)


def auto_precision(device: torch.device) -> Precision:
    """bfloat16 where a measurement shows that its products are fast, float16 on GPUs that have no
    bfloat16, else float32."""
    if fast_bfloat16(device):
        return "bfloat16"
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "float16"
    return "float32"


def flagged_precision(device: torch.device) -> Precision:
    """What ``auto`` was before it was measured: 16 bits where the processor says that it has units
    for them. For runs that were begun so."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(False) else "float16"
    flags = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if device.type == "cpu" and flags else "float32"
