"""Least squares on a support: conjugate gradients on all rows of a matrix together."""

from __future__ import annotations

from collections.abc import Callable

import torch


def descend(
    start: torch.Tensor,
    residual: torch.Tensor,
    product: Callable[[torch.Tensor], torch.Tensor],
    mask: torch.Tensor,
    iterations: int,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Solve ``x A = start A + residual`` row by row on the mask, where x - start is zero off it.

    No iteration leaves the error of a row, in the norm of A, larger than it was.

    Args:
        start: [rows, n].
        residual: [rows, n]; what lies off the mask is not looked at.
        product: x [rows, n] -> x A, a new tensor; A is symmetric and positive definite.
        mask: [rows, n], bool.
        iterations: at most; it ends when every row's residual is 1e-10 of what it was, squared.
        scale: [n], what the diagonal of A is divided by; None where its entries are alike.
    """
    solution = start.clone()
    residual = residual * mask
    direction = residual.clone() if scale is None else residual * scale
    energy = (residual * direction).sum(1, keepdim=True)
    floor = energy * 1e-10
    for _ in range(iterations):
        image = product(direction).mul_(mask)
        curvature = (direction * image).sum(1, keepdim=True)
        # Rows that have converged stand still; their curvature may be zero.
        moving = energy > floor
        step = torch.where(moving, energy / curvature.clamp_min(1e-30), 0.0)
        solution.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        conditioned = residual if scale is None else residual * scale
        following = (residual * conditioned).sum(1, keepdim=True)
        ratio = torch.where(moving, following / energy.clamp_min(1e-30), 0.0)
        direction.mul_(ratio).add_(conditioned)
        energy = following
        if not bool((energy > floor).any()):
            break
    return solution
