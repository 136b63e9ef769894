"""2:4 sparse linears on the GPU units that multiply them at up to twice the rate of dense ones.

Ampere and later NVIDIA GPUs skip the zeros of weights that keep two of every four (Mishra et al.
2021, "Accelerating Sparse Deep Neural Networks"); PyTorch offers them as tensors of a class of
their own. The change is one of memory layout and kernel: values stay as they are, and what cannot
be converted stays dense, with the reason on record.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.sparse import SparseSemiStructuredTensor, SparseSemiStructuredTensorCUTLASS
from transformers.pytorch_utils import Conv1D

from compress.errors import CompressError
from compress.linear.layer import Layer

CUSPARSELT, CUTLASS = "cuSPARSELt", "CUTLASS"

# Rows and columns must be multiples of these for 16-bit types (torch.sparse, table of
# semi-structured sparsity).
_MULTIPLES = {CUSPARSELT: (16, 16), CUTLASS: (32, 64)}
_DTYPES = (torch.float16, torch.bfloat16)
_PROBE_ROWS = 64


@dataclass(frozen=True)
class SemiStructured:
    """What :func:`convert` did; kept on the model as ``model.semi_structured``.

    Attributes:
        backend: the library whose kernels run ("" where nothing was converted).
        converted: paths of the linears that run sparse.
        dense: path -> why it stays dense, of all other linears.
        reason: why nothing could be converted here; "" where something was.
    """

    backend: str = ""
    converted: tuple[str, ...] = ()
    dense: dict[str, str] = field(default_factory=dict)
    reason: str = ""

    def __str__(self) -> str:
        if self.reason:
            return f"no 2:4 products: {self.reason}"
        why = Counter(self.dense.values()).most_common()
        rest = "; ".join(f"{count} dense ({reason})" for reason, count in why)
        total = f"2:4 products ({self.backend}) in {len(self.converted)} linears"
        return f"{total}; {rest}" if rest else total


def convert(model: nn.Module) -> SemiStructured:
    """Turn a model's 2:4 sparse ``nn.Linear`` weights into semi-structured tensors, in place.

    For inference only: converted weights take no gradient and cannot be saved. Each shape is tried
    once against the dense product; where a kernel is missing or wrong, its layers stay dense.

    Args:
        model: with all weights on one device.

    Returns:
        What was converted and what was not, and why.
    """
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    device = torch.device("cpu") if weight is None else weight.device
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    dtype = torch.float32 if weight is None else weight.dtype
    backend = choose_backend(device, dtype, capability, cusparselt_available())
    if backend not in _MULTIPLES:
        report = SemiStructured(reason=backend)
    else:
        report = _convert(model, backend)
    model.semi_structured = report
    return report


def choose_backend(
    device: torch.device,
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    cusparselt: bool,
) -> str:
    """Return ``CUSPARSELT`` or ``CUTLASS``, or else a clause that says why there is neither.

    Args:
        capability: compute capability of the GPU (None: not a CUDA device).
        cusparselt: whether this build of torch has cuSPARSELt.
    """
    if device.type != "cuda" or capability is None:
        return f"the model is on {device.type}, and only CUDA GPUs have them"
    if torch.version.hip is not None:
        return "this build of torch is for ROCm"
    if capability < (8, 0):
        version = ".".join(map(str, capability))
        return f"they need a GPU of compute capability 8.0 or more, and this one has {version}"
    if dtype not in _DTYPES:
        return f"weights are {_name(dtype)}: load with dtype=torch.bfloat16 or torch.float16"
    if cusparselt:
        return CUSPARSELT
    if capability[0] == 8:  # PyTorch's CUTLASS kernels are built for these alone
        return CUTLASS
    return "this build of torch has no cuSPARSELt, which GPUs after capability 8.x need"


def cusparselt_available() -> bool:
    """Whether torch can call cuSPARSELt here."""
    backend = getattr(torch.backends, "cusparselt", None)
    return backend is not None and backend.is_available()


def candidates(model: nn.Module, backend: str) -> tuple[list[str], dict[str, str]]:
    """Tell which linears can be converted; looks at their weights, on whatever device.

    Returns:
        Paths of those that can, and path -> reason of all others.
    """
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    can: list[str] = []
    cannot: dict[str, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, Conv1D):
            cannot[path] = "a Conv1D, whose product has the weight on the other side"
        if not isinstance(module, nn.Linear):
            continue
        reason = _obstacle(module, backend, shared=uses[id(module.weight)] > 1)
        if reason:
            cannot[path] = reason
        else:
            can.append(path)
    return can, cannot


def _obstacle(module: nn.Linear, backend: str, shared: bool) -> str:
    weight = module.weight
    if isinstance(weight, SparseSemiStructuredTensor):
        return "converted already"
    if shared:
        return "its weight is shared with another module"
    if weight.dtype not in _DTYPES:
        return f"its weight is {_name(weight.dtype)}"
    if not is_two_of_four(weight):
        return "not 2:4 sparse"
    rows, columns = _MULTIPLES[backend]
    if weight.shape[0] % rows or weight.shape[1] % columns:
        return f"its size is no multiple of {rows} x {columns}"
    return ""


def is_two_of_four(weight: torch.Tensor) -> bool:
    """True if at most two in every four weights along a row [out, in] are not zero."""
    if weight.dim() != 2 or weight.shape[1] % 4:
        return False
    # A dense matrix shows itself in its first rows.
    for part in (weight[:8], weight):
        if bool(((part != 0).unflatten(1, (-1, 4)).sum(-1) > 2).any()):
            return False
    return True


def _convert(model: nn.Module, backend: str) -> SemiStructured:
    can, dense = candidates(model, backend)
    pack = _packer(backend)
    tried: dict[tuple[int, ...], str] = {}
    converted = []
    for path in can:
        module = model.get_submodule(path)
        shape = tuple(module.weight.shape)
        if shape not in tried:
            tried[shape] = _trial(module, pack)
        if tried[shape]:
            dense[path] = tried[shape]
            continue
        packed = pack(module.weight.detach().contiguous())
        module.weight = nn.Parameter(packed, requires_grad=False)
        converted.append(path)
    reason = ""
    if not converted:
        why = Counter(dense.values()).most_common(1)
        reason = f"no linear qualifies ({why[0][0]})" if why else "the model has no linears"
    return SemiStructured(backend if converted else "", tuple(converted), dense, reason)


def _packer(backend: str) -> Callable[[torch.Tensor], torch.Tensor]:
    if backend == CUTLASS:
        return SparseSemiStructuredTensorCUTLASS.from_dense
    return torch.sparse.to_sparse_semi_structured


@torch.no_grad()
def _trial(module: nn.Linear, pack: Callable[[torch.Tensor], torch.Tensor]) -> str:
    """Compare a sparse product with the dense one; return "" or what is wrong."""
    weight = module.weight.detach()
    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(
        _PROBE_ROWS, weight.shape[1], generator=generator, device=weight.device, dtype=weight.dtype
    )
    expected = nn.functional.linear(x, weight).float()
    try:
        found = nn.functional.linear(x, pack(weight.contiguous())).float()
    except (RuntimeError, NotImplementedError) as error:
        return f"the kernel refused it: {str(error).splitlines()[0]}"
    error = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-20))
    # Both round to 16 bits once; sums of another order differ by a few units of the last place.
    return "" if error <= 0.02 else f"the kernel's result differs by {error:.1%}"


def describe_execution(model: nn.Module) -> str:
    """Say in a clause which products a model's linears run as it is: for the cost in a report.

    Looks at the weights themselves, so it holds whatever was done to the model.
    """
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    sparse = [m for m in linears if isinstance(m.weight, SparseSemiStructuredTensor)]
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    if weight is None:
        return "no floating-point weights"
    place = f"{_device_name(weight.device)}, {_name(weight.dtype)}"
    if sparse:
        kernel = CUTLASS if sparse[0].weight.meta is not None else CUSPARSELT
        return f"2:4 products ({kernel}) in {len(sparse)} of {len(linears)} linears on {place}"
    layers = Counter(m.execution() for m in model.modules() if isinstance(m, Layer))
    del layers[""]
    if layers:
        ways = ", ".join(f"{way} in {count}" for way, count in layers.most_common())
        return f"{ways} of {len(linears) + layers.total()} linears on {place}"
    tried = getattr(model, "semi_structured", None)
    if tried is not None and tried.reason:
        return f"dense products on {place} ({tried.reason})"
    if (getattr(getattr(model, "config", None), "compress", None) or {}).get("zeros"):
        return f"dense products on {place}: zeros take part in them and save no time"
    return f"dense products on {place}"


def refuse_converted(model: nn.Module, purpose: str) -> None:
    """Raise if a model holds semi-structured weights, which only a forward pass can use.

    Raises:
        CompressError: it does.
    """
    if any(isinstance(p, SparseSemiStructuredTensor) for p in model.parameters()):
        raise CompressError(
            f"a model with ordinary weights {purpose}", "one loaded with semi_structured",
            "Load it again without that option",
        )  # fmt: skip


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
