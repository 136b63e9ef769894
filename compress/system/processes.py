"""Several processes that train together: who this one is, and sums over all.

One process carries out a run, inside :func:`alone`, and calls the others to each training that all
take part in (:func:`joined`, :func:`next_task`).

The group is the one that ``accelerate launch`` describes; accelerate opens it (gloo on CPUs, nccl
on GPUs).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch

from compress.errors import CompressError

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


def refuse_sharding() -> None:
    """Refuse to run where the launcher has been told to shard models.

    Raises:
        CompressError: under ``accelerate launch --use_fsdp``.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise CompressError(
            "processes that each hold the whole model, as runs train it",
            "accelerate launch --use_fsdp",
            "Leave --use_fsdp out; compress.train.fit takes sharded modules (docs/distributed.md)",
        )


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


@contextlib.contextmanager
def joined(task: int) -> Iterator[None]:
    """Call the other processes to a task, and train with them meanwhile.

    They have to be in :func:`next_task`. A process that runs by itself just goes on.
    """
    global _alone
    tell(task)
    before, _alone = _alone, False
    try:
        yield
    finally:
        _alone = before


def tell(task: int | None) -> None:
    """Tell all processes that wait in :func:`next_task`; None sends them home."""
    if launched().size > 1:
        _broadcast(-1 if task is None else task)


def next_task() -> int | None:
    """Wait until the first process names a task; None when there is nothing more to do.

    Raises:
        CompressError: another process has ended.
    """
    task = _broadcast(0)
    return None if task < 0 else task


def _broadcast(value: int) -> int:
    from accelerate import PartialState
    from torch import distributed

    message = torch.tensor([value], device=PartialState().device)
    try:
        distributed.broadcast(message, src=0)
    except RuntimeError as error:
        raise CompressError(
            f"all {launched().size} processes of this run alive", "one that has ended",
            "What it said is the reason; run the same command again to go on",
        ) from error  # fmt: skip
    return int(message)


def wait_for_all() -> None:
    """Return when every process that trains together has come here."""
    if world().size > 1:
        from torch import distributed

        distributed.barrier()
