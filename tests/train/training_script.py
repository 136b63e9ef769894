"""A training in a process of its own: ``python training_script.py OUT [FOLDER [KILL_AT]]``.

Writes the trained parameters and losses to OUT; ends itself by SIGKILL before step KILL_AT.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

from compress import distributed
from compress.train import TrainingOptions, fit

OPTIONS = TrainingOptions(
    steps=10, batch=8, micro_batch=2, learning_rate=1e-2, warmup=2, weight_decay=0.1, ema=0.9,
    precision="float32", checkpoint_every=3,
)  # fmt: skip


class Points:
    """21 random vectors: no multiple of the batch, so that epochs end inside steps."""

    def __init__(self) -> None:
        self.values = torch.randn(21, 4, 6, generator=torch.Generator().manual_seed(4))

    def __len__(self) -> int:
        return len(self.values)

    def get(self, indices: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"x": self.values[indices]}


def make_module() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Dropout(0.2), nn.Linear(12, 6)).train()


def noisy_loss(module, batch, moment):
    """Reconstruct x from a noisy x: dropout, noise of the micro-batch and noise of the step."""
    x = batch["x"]
    own = torch.randn(x.shape, generator=moment.generator())
    common = torch.randn(x.shape[1:], generator=moment.generator(stream=1, shared=True))
    loss = (module(x + 0.1 * own + 0.1 * common) - x).square().mean()
    return loss, {"noise": float(common.mean())}


def main(out: str, folder: str | None = None, kill_at: str | None = None) -> None:
    steps = 0

    def guard() -> None:
        nonlocal steps
        if kill_at is not None and steps == int(kill_at):
            os.kill(os.getpid(), signal.SIGKILL)
        steps += 1

    torch.set_num_threads(1)
    module = make_module()
    result = fit(
        module, noisy_loss, Points(), OPTIONS, seed=3, guard=guard,
        folder=None if folder is None else Path(folder),
    )  # fmt: skip
    if distributed.world().rank == 0:
        state = dict(module.state_dict()) | {
            "losses": torch.tensor([line["loss"] for line in result.history], dtype=torch.float64),
            "processes": torch.tensor(distributed.world().size),
        }
        torch.save(state, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
