"""Linear maps as methods see them: a matrix [out, in], whatever class holds it.

``nn.Linear`` stores [out, in]; GPT-2's ``Conv1D`` stores [in, out]. Everything that cares about the
difference is in this file.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is a GPT-2 ``Conv1D``, which stores its matrix transposed."""
    return isinstance(module, Conv1D)


def is_linear(module: nn.Module) -> bool:
    """True for modules that hold one weight matrix applied to the last dimension of their input."""
    return isinstance(module, (nn.Linear, Conv1D))


def matrix(module: nn.Module) -> torch.Tensor:
    """Return the weight as a matrix [out, in]; a view, so writing to it writes to the module."""
    return module.weight.data.t() if isinstance(module, Conv1D) else module.weight.data


def set_matrix(module: nn.Module, weight: torch.Tensor) -> None:
    """Replace the weight by a matrix [out, in] of any size and make the module's sizes follow."""
    stored = weight.t() if isinstance(module, Conv1D) else weight
    module.weight = nn.Parameter(stored.contiguous(), requires_grad=module.weight.requires_grad)
    out_features, in_features = weight.shape
    if isinstance(module, Conv1D):
        module.nf, module.nx = out_features, in_features
    else:
        module.out_features, module.in_features = out_features, in_features


def is_sparse(module: nn.Module) -> bool:
    """Whether zeros of the weight are there on purpose: a step has noted so on the module, or at
    least one weight in a hundred is zero, which training alone does not leave."""
    if getattr(module, "zeros", None):
        return True
    weight = matrix(module)
    return weight.numel() - int(weight.count_nonzero()) >= 0.01 * weight.numel() > 0


def features(module: nn.Module) -> tuple[int, int]:
    """Return (out_features, in_features)."""
    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0]
    return module.out_features, module.in_features


def slice_linear(
    module: nn.Module, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None
) -> None:
    """Keep only the given output rows and input columns (int64 indices, in the given order)."""
    weight = matrix(module)
    if rows is not None:
        weight = weight.index_select(0, rows)
        if module.bias is not None:
            module.bias = nn.Parameter(
                module.bias.data.index_select(0, rows), requires_grad=module.bias.requires_grad
            )
    if columns is not None:
        weight = weight.index_select(1, columns)
    set_matrix(module, weight)


def linear_from_conv1d(module: nn.Module) -> nn.Linear:
    """Return an ``nn.Linear`` that computes what a GPT-2 ``Conv1D`` (weight [in, out]) does.

    The new linear says where it comes from (``was_conv1d``): a checkpoint that holds it is no
    longer of the stock architecture.
    """
    in_features, out_features = module.weight.shape
    linear = nn.Linear(in_features, out_features, device="meta")
    weight = module.weight.data.t().contiguous()
    linear.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
    linear.bias = module.bias
    copy_marks(module, linear)
    linear.was_conv1d = True
    return linear.train(module.training)


def as_linear(module: nn.Module) -> nn.Linear:
    """Return ``module`` itself if it is an ``nn.Linear``, or the linear that replaces a Conv1D."""
    return linear_from_conv1d(module) if isinstance(module, Conv1D) else module


def copy_marks(source: nn.Module, target: nn.Module) -> None:
    """Carry what steps noted on a linear over to the module that replaces it.

    ``zeros`` ("2:4", "unstructured"): the pattern that a sparsity step left;
    ``was_conv1d``: see :func:`linear_from_conv1d`.
    """
    for mark in ("zeros", "was_conv1d"):
        if hasattr(source, mark):
            setattr(target, mark, getattr(source, mark))
