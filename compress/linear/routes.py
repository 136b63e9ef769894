"""Which of several ways to compute the same is the fastest here: measured, once for each size."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

Route = Callable[[torch.Tensor], torch.Tensor]

_REPEATS = 5

_FOUND: dict[Hashable, int] = {}


def fastest(key: Hashable, routes: Sequence[Route], inputs: torch.Tensor) -> Route:
    """The one of ``routes`` that takes the least time on ``inputs``.

    Each is run once to warm up, then all in turn a few times; the least time of each counts. The
    answer is kept for the life of the process.

    Args:
        key: everything that the times depend on.
        routes: ways to compute the same, in the same order at every call with this key.
    """
    if key not in _FOUND:
        for route in routes:
            route(inputs)
        rounds = [_round(routes, inputs) for _ in range(_REPEATS)]
        times = [min(times) for times in zip(*rounds, strict=True)]
        _FOUND[key] = times.index(min(times))
    return routes[_FOUND[key]]


def watched() -> bool:
    """Whether operations are counted or recorded: who looks on is to see the plainest route."""
    return _get_current_dispatch_mode() is not None


def _round(routes: Sequence[Route], inputs: torch.Tensor) -> list[float]:
    """Seconds that each takes once."""
    found = []
    for route in routes:
        _wait(inputs)
        start = time.perf_counter()
        route(inputs)
        _wait(inputs)
        found.append(time.perf_counter() - start)
    return found


def _wait(inputs: torch.Tensor) -> None:
    if inputs.is_cuda:
        torch.cuda.synchronize(inputs.device)
