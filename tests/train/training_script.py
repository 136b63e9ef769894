"""A training in a process of its own: ``python training_script.py OUT [FOLDER [KILL_AT]]``.

Writes the trained parameters and losses to OUT; ends itself by SIGKILL before step KILL_AT. Several
processes do it once more with the module sharded over them, from a checkpoint in the middle.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

from compress.system import processes
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


class Stopped(Exception):
    pass


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
    many = processes.world().size > 1
    sharded = train_sharded(Path(f"{folder}-sharded")) if many else {}
    if processes.world().rank == 0:
        state = dict(module.state_dict()) | {
            "losses": torch.tensor([line["loss"] for line in result.history], dtype=torch.float64),
            "processes": torch.tensor(processes.world().size),
        }
        torch.save(state | {f"sharded.{n}": t for n, t in sharded.items()}, out)


def train_sharded(folder: Path) -> dict[str, torch.Tensor]:
    """The same training of a sharded module, cut off behind its second checkpoint and resumed."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    calls = iter(range(7))

    def stop() -> None:
        if next(calls, None) is None:
            raise Stopped

    mesh = init_device_mesh("cpu", (processes.world().size,))
    for guard in (stop, lambda: None):
        module = make_module()
        fully_shard(module[3], mesh=mesh)
        fully_shard(module, mesh=mesh)
        with contextlib.suppress(Stopped):
            fit(module, noisy_loss, Points(), OPTIONS, seed=3, folder=folder, guard=guard)
    return {name: p.detach().full_tensor() for name, p in module.named_parameters()}


if __name__ == "__main__":
    main(*sys.argv[1:])
