"""Several processes that train together: who this one is, and sums over all.

The group is the one that ``accelerate launch`` describes; accelerate opens it (gloo on CPUs, nccl
on GPUs). Everything but training happens in one process, inside :func:`alone`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch

_PATIENCE = timedelta(days=14)  # a process may wait for another one's whole run
_BUCKET = 2**22  # values that are summed at once: enough to hide latencies, little memory

_alone = False


@dataclass(frozen=True)
class World:
    """This process among those that train together.

    Attributes:
        rank: from 0. size: how many there are.
    """

    rank: int = 0
    size: int = 1


def launched() -> World:
    """This process among those that were launched together, training or not."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    from accelerate import PartialState

    # Without being told, accelerate opens no group on a machine that has no GPU.
    cpu = not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, timeout=_PATIENCE)
    return World(state.process_index, state.num_processes)


def world() -> World:
    """The processes that train together: those launched, or this one inside :func:`alone`."""
    return World() if _alone else launched()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Let this process train by itself meanwhile, whatever the others do."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def sum_over_processes(tensors: Sequence[torch.Tensor]) -> None:
    """Add up tensors, in place, over all processes; one dtype, the same shapes everywhere."""
    from torch import distributed

    bucket: list[torch.Tensor] = []
    held = 0
    for position, tensor in enumerate(tensors):
        bucket.append(tensor)
        held += tensor.numel()
        if held < _BUCKET and position < len(tensors) - 1:
            continue
        flat = torch.cat([t.reshape(-1) for t in bucket])
        distributed.all_reduce(flat)
        for piece, target in zip(flat.split([t.numel() for t in bucket]), bucket, strict=True):
            target.copy_(piece.view_as(target))
        bucket, held = [], 0


def wait_for_all() -> None:
    """Return when every process that trains together has come here."""
    if world().size > 1:
        from torch import distributed

        distributed.barrier()
