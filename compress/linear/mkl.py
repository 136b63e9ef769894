"""Products of bfloat16 matrices that are summed in float32, on CPUs: MKL's ``gemm_bf16bf16f32``.

torch itself rounds such a product to bfloat16 on a CPU (``out_dtype`` is for GPUs), or lets one
say, for the whole process, that float32 matrices may be taken for bfloat16 ones, which would change
what other threads multiply meanwhile. MKL, which torch's builds for x86 hold, has the product as a
function of its own (oneMKL reference, BLAS-like extensions). Where a processor has no instructions
for it, it takes as long as one of float32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch


def sums_bfloat16() -> bool:
    """Whether torch's libraries hold the product, and it gives what it should."""
    return _function() is not None


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add left^T right to ``total``; only where :func:`sums_bfloat16`.

    Args:
        total: float32 [m, n]. left: bfloat16 [k, m]. right: bfloat16 [k, n]; all on the CPU, with
            neighbours in memory along the last dimension.
    """
    function = _function()
    assert function is not None
    _call(function, total, left, right)


@lru_cache
def _function() -> Callable[..., None] | None:
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    with suppress(OSError, AttributeError):
        function = ctypes.CDLL(str(library)).GEMM_BF16BF16F32
        function.restype = None
        left = torch.arange(6, dtype=torch.bfloat16).view(2, 3)
        total = torch.ones(3, 3)
        _call(function, total, left, left)
        if torch.equal(total, 1 + left.float().t() @ left.float()):
            return function
    return None


def _call(
    function: Callable[..., None], total: torch.Tensor, left: torch.Tensor, right: torch.Tensor
) -> None:
    for matrix, dtype in ((total, torch.float32), (left, torch.bfloat16), (right, torch.bfloat16)):
        if matrix.dtype != dtype or matrix.device.type != "cpu" or matrix.stride(1) != 1:
            raise ValueError(f"a matrix of {dtype} on the CPU, row by row, not {matrix.dtype}")
    (k, m), n = left.shape, right.shape[1]
    if right.shape[0] != k or total.shape != (m, n):
        raise ValueError(f"{tuple(total.shape)} is no {tuple(left.shape)}^T {tuple(right.shape)}")
    if 0 in (k, m, n):
        return
    # By columns, as Fortran reads memory, all are transposed: total^T = right^T left. Numbers are
    # of 64 bits, whose lower half is read where the interface is of 32.
    function(
        b"N", b"T", _int(n), _int(m), _int(k), _one(), _at(right), _int(right.stride(0)),
        _at(left), _int(left.stride(0)), _one(), _at(total), _int(total.stride(0)),
    )  # fmt: skip


def _int(value: int) -> Any:
    return ctypes.byref(ctypes.c_int64(value))


def _one() -> Any:
    return ctypes.byref(ctypes.c_float(1))


def _at(matrix: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(matrix.data_ptr())
