"""In which type matrix products are fast on this machine: measured once, not told by a rule.

A processor's flags do not say it. bfloat16 is five times as fast as float32 on a CPU with
AVX512-BF16 and two hundred times slower on one with AVX2 alone, and both run it without a warning.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import torch

from compress.errors import CompressError
from compress.system.intake import reason
from compress.system.threads import threads

Compute = Literal["auto", "float32", "bfloat16"]

# Rows, inputs, outputs of the products that are timed. The first takes a fortieth of a second even
# where products in 16 bits are emulated, and settles those cases; the second is of a model's size.
_SMALL, _LARGE = (64, 256, 256), (512, 1024, 1024)

_WRITTEN = 48 * 2**20  # bytes: beyond what an allocator keeps, as activations are

# Casting and rounding cost something too: a type must be this much faster to be worth it.
_WORTH = 1.4


def device_of(name: str) -> torch.device:
    """The device that a recipe names; auto takes CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "meta":
            raise ValueError("tensors without values")
    except (RuntimeError, AssertionError, ImportError, ValueError) as error:
        raise CompressError(
            "a device that torch can use here (auto, cpu, cuda:N)", f"{name!r} ({reason(error)})",
            "Set device: auto",
        ) from None  # fmt: skip
    return device


def calibration_dtype(compute: Compute, device: torch.device | str) -> torch.dtype:
    """The type of matrix products in calibration passes; ``auto`` asks the machine."""
    if compute == "auto":
        return torch.bfloat16 if fast_bfloat16(device) else torch.float32
    return getattr(torch, compute)


def fast_bfloat16(device: torch.device | str = "cpu") -> bool:
    """Whether products of bfloat16 matrices are at least 1.4 times as fast as those of float32.

    Takes a tenth of a second the first time a process asks for a device, nothing afterwards.
    """
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return False
    if device.type not in ("cpu", "cuda"):
        return False
    return _fast(str(device))


@lru_cache
def _fast(device: str) -> bool:
    # Of one thread, and its time rather than the clock's: other processes may be at work, and
    # threads that wait for each other count as busy.
    clock = time.thread_time if device.startswith("cpu") else time.perf_counter
    pair = (torch.float32, torch.bfloat16)
    with threads(1):
        full, half = (_seconds(dtype, device, _SMALL, clock) for dtype in pair)
        if half > 20 * full:
            return False
        full, half = (_seconds(dtype, device, _LARGE, clock) for dtype in pair)
    return half * _WORTH <= full


@lru_cache
def product_speed(
    dtype: torch.dtype = torch.float32, device: str = "cpu", rows: int = _LARGE[0]
) -> float:
    """Multiply-accumulates a second of products of so many rows in ``dtype`` on this machine.

    Few rows are slower: each product begins with a new order of the weight.
    """
    shape = (rows, *_LARGE[1:])
    return math.prod(shape) / _seconds(dtype, device, shape, time.perf_counter)


@lru_cache
def writing_speed() -> float:
    """Bytes a second that elementwise operations write on this machine, to memory that is new."""
    a, taken = torch.ones(_WRITTEN // 4), []
    while len(taken) < 5 or (len(taken) < 12 and sum(taken) < 0.1):
        start = time.perf_counter()
        a + a
        taken.append(time.perf_counter() - start)
    return _WRITTEN / min(taken)


def _seconds(
    dtype: torch.dtype, device: str, shape: tuple[int, int, int], clock: Callable[[], float]
) -> float:
    """Of one product; the best of many, since whatever else happens can only make one slower."""
    rows, inputs, outputs = shape
    a = torch.ones(rows, inputs, dtype=dtype, device=device)
    b = torch.ones(outputs, inputs, dtype=dtype, device=device)
    taken: list[float] = []
    while len(taken) < 3 or (len(taken) < 12 and sum(taken) < 0.15):
        start = clock()
        out = torch.nn.functional.linear(a, b)
        if out.is_cuda:
            torch.cuda.synchronize(out.device)
        taken.append(clock() - start)
    return min(taken)
