"""A linear that takes over a share of another one's weights, entry by entry, and tunes its own."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from compress.linear.matrix import features, matrix


class GraftedLinear(nn.Module):
    """W + B A + (C_l C_r) * W_p in the place of a linear, while B, A, C_l and C_r learn.

    W is the linear's matrix, W_p that of the same linear in the block that goes, * the product of
    entries; both stay as they are. A bias becomes b + c * b_p. B, C_l and c are zero at the start,
    so that the linear is then what it was (Pei et al. 2024, FuseGPT, arXiv 2411.14507).

    Args:
        linear: ``nn.Linear`` or ``Conv1D``, not written to before :meth:`merge`.
        removed: likewise, never written to.
        rank: columns of B and C_l; no more than the matrix has rows or columns are made.
        seed: of the values of A and C_r.
    """

    def __init__(self, linear: nn.Module, removed: nn.Module, rank: int, seed: int) -> None:
        super().__init__()
        self.inner = linear
        # Plain tensors of the other block: not parameters of this one, and not copied.
        self._removed = matrix(removed)
        self._removed_bias = None if removed.bias is None else removed.bias.data
        rows, columns = features(linear)
        rank = min(rank, rows, columns)
        generator = torch.Generator().manual_seed(seed)
        like = {"device": linear.weight.device, "dtype": torch.float32}

        def thin() -> nn.Parameter:
            # Kaiming's uniform distribution with a = sqrt(5), as LoRA's A has it.
            values = 2 * torch.rand(rank, columns, generator=generator) - 1
            return nn.Parameter((values / columns**0.5).to(**like))

        self.delta_left = nn.Parameter(torch.zeros(rows, rank, **like))
        self.delta_right = thin()
        self.coefficient_left = nn.Parameter(torch.zeros(rows, rank, **like))
        self.coefficient_right = thin()
        self.coefficient_bias: nn.Parameter | None = None
        if linear.bias is not None:
            self.coefficient_bias = nn.Parameter(torch.zeros(rows, **like))
        self.hold()

    @property
    def coefficients(self) -> list[nn.Parameter]:
        """C_l, C_r and c: how much of the other linear is taken over."""
        found = [self.coefficient_left, self.coefficient_right, self.coefficient_bias]
        return [parameter for parameter in found if parameter is not None]

    @property
    def deltas(self) -> list[nn.Parameter]:
        """B and A: how the linear's own weights change."""
        return [self.delta_left, self.delta_right]

    def hold(self) -> None:
        """Compute weight and bias once for several forwards to come, in the type of their products.

        Attributes ``weight`` [out, in] and ``bias`` [out] are those afterwards.
        """
        weight = matrix(self.inner) + self.delta_left @ self.delta_right
        weight = weight + (self.coefficient_left @ self.coefficient_right) * self._removed
        device = weight.device.type
        if torch.is_autocast_enabled(device):
            weight = weight.to(torch.get_autocast_dtype(device))
        self.weight, self.bias = weight, None
        if self.coefficient_bias is not None:
            self.bias = self.inner.bias.data + self.coefficient_bias * self._removed_bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight, self.bias)

    def merge(self) -> nn.Module:
        """The linear itself, with all of it in its weight and bias."""
        hold_exactly([self])
        matrix(self.inner).copy_(self.weight)
        if self.inner.bias is not None:
            self.inner.bias.data.copy_(self.bias)
        return self.inner


def grafts(module: nn.Module) -> dict[str, GraftedLinear]:
    """Paths of all grafted linears inside a module."""
    return {n: m for n, m in module.named_modules() if isinstance(m, GraftedLinear)}


@torch.no_grad()
def hold_exactly(linears: list[GraftedLinear]) -> None:
    """Make weights what they will be when they are merged: in float32, whatever is learned in."""
    for linear in linears:
        with torch.autocast(linear.inner.weight.device.type, enabled=False):
            linear.hold()


@torch.no_grad()
def merge_grafts(block: nn.Module) -> None:
    """Take grafted linears out of a block, what they learned merged into the weights."""
    for path, linear in grafts(block).items():
        block.set_submodule(path, linear.merge())
