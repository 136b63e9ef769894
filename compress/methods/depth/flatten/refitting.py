"""The FFN of a narrowed block is fitted to what the blocks that it stands for returned together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from compress.linear.algebra import cholesky
from compress.linear.casting import computing
from compress.linear.matrix import matrix
from compress.models.anatomy import DOWN
from compress.train.reconstruction import BlockWork, split_held_out


@dataclass
class _Normal:
    """Normal equations of min_D sum_t v_t |r_t - D x_t|^2, v_t = 1 / |y_t|^2 of a token t.

    Attributes:
        gram: sum v x x^T [n, n]. cross: sum v r x^T [out, n]. energy: sum v |r|^2.
    """

    gram: torch.Tensor
    cross: torch.Tensor
    energy: float = 0.0

    def add(self, x: torch.Tensor, missing: torch.Tensor, target: torch.Tensor) -> None:
        """Count tokens: inputs x [t, n], r [t, out] and y [t, out]."""
        scale = target.norm(dim=1, keepdim=True).clamp_min(torch.finfo(target.dtype).tiny)
        x, missing = x / scale, missing / scale
        self.gram.addmm_(x.t(), x)
        self.cross.addmm_(missing.t(), x)
        self.energy += float(missing.square().sum(dtype=torch.float64))

    def solved(self, ridge: float, what: str) -> torch.Tensor:
        """D = C (G + lambda)^-1 [out, n], lambda = ridge times the mean of G's diagonal."""
        shifted = self.gram.double()
        mean = float(shifted.diagonal().mean())
        shifted.diagonal().add_(ridge * mean if mean > 0 else 1.0)
        return torch.cholesky_solve(self.cross.double().t(), cholesky(shifted, what)).t().float()

    def error(self, change: torch.Tensor) -> float:
        """The sum that is minimised, for D = ``change``, over that for D = 0."""
        change = change.double()
        reached = (change @ self.gram.double() - 2 * self.cross.double()).mul_(change).sum()
        return 1 + float(reached) / self.energy if self.energy > 0 else 1.0


@torch.no_grad()
def refit(work: BlockWork, ridges: Sequence[float]) -> None:
    """Change the down projection so that the block returns, as nearly as it can, its targets.

    With y what the block should return, y' what it returns and x what enters the projection W, the
    change D minimises sum_t |y_t - y'_t - D x_t|^2 / |y_t|^2 + lambda |D|^2: the relative error, as
    the next block normalises each token. What putting blocks side by side, narrowing them, and
    everything in front of them has cost is made up for as far as the neurons can.

    Of several lambda that one counts with which held-out calibration batches are served best, or no
    change. Metrics: ``refit``, the error there over that before; ``refit.ridge``, 0 for no change.

    Args:
        work: of one block whose down projection adds to what the block returns.
        ridges: lambda, as multiples of the mean weighted energy of a neuron.
    """
    block, (name,) = work.block, work.anatomy.site(DOWN).linears
    linear, seen = block.get_submodule(name), []
    weight = matrix(linear)
    fitted, held = _normal(weight), _normal(weight)
    learned, _ = split_held_out(len(work.inputs))
    hook = linear.register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
    try:
        with computing(block, work.compute):
            for batch in range(len(work.inputs)):
                work.guard()
                call, target = work.calls[0][batch], work.targets.read(batch).to(work.device)
                output = call(block, work.inputs.read(batch).to(work.device))
                x, target, missing = (
                    call.tokens(values).flatten(0, -2).float()
                    for values in (seen.pop(), target, target - output)
                )
                (fitted if batch < learned else held).add(x, missing, target)
    finally:
        hook.remove()
    if learned == len(work.inputs):
        held = fitted
    best, chosen, change = 1.0, 0.0, None
    for ridge in ridges:
        tried = fitted.solved(ridge, f"{work.anatomy.path}.{name}")
        error = held.error(tried)
        if error < best:
            best, chosen, change = error, ridge, tried
    if change is not None:
        weight.add_(change)
    work.metrics |= {"refit": best, "refit.ridge": chosen}


def _normal(weight: torch.Tensor) -> _Normal:
    out, width = weight.shape
    return _Normal(weight.new_zeros(width, width), weight.new_zeros(out, width))
