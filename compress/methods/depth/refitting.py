"""The FFN of a block is fitted to what it is to return, also in the place of blocks that go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from compress.linear.algebra import cholesky
from compress.linear.casting import computing
from compress.linear.matrix import matrix
from compress.methods.passes import Shapes
from compress.models.anatomy import DOWN
from compress.train.reconstruction import BlockWork, split_held_out

RIDGES = (0.001, 0.01, 0.1, 1.0, 10.0)


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
    """Change the down projection of the last block so that it returns its targets more nearly.

    With y what the block should return, y' what it returns and x what enters the projection W, the
    change D minimises sum_t |y_t - y'_t - D x_t|^2 / |y_t|^2 + lambda |D|^2: the relative error, as
    the next block normalises each token. What has been done to the blocks at hand, and everything
    in front of them, has cost is made up for as far as the neurons can.

    Of several lambda that one counts with which held-out calibration batches are served best, or no
    change. A forward pass over these batches has the last word: where something stands between the
    projection and what the block returns (the norm of a post-norm block), the optimum is none.
    Metrics: ``refit``, the error there over that before; ``refit.ridge``, 0 for no change. A block
    without an FFN of two layers is left alone.

    Args:
        ridges: lambda, as multiples of the mean weighted energy of a neuron.
    """
    block, anatomy = work.blocks[-1], work.anatomies[-1]
    site = anatomy.site(DOWN)
    if site is None or len(site.linears) != 1:
        return
    (name,) = site.linears
    weight = matrix(block.get_submodule(name))
    fitted, held = _normal(weight), _normal(weight)
    learned, measuring = split_held_out(len(work.inputs))
    for batch, tokens in _tokens(work, name, range(len(work.inputs))):
        (fitted if batch < learned else held).add(*tokens)
    if learned == len(work.inputs):
        held = fitted
    best, chosen, change = 1.0, 0.0, None
    for ridge in ridges:
        tried = fitted.solved(ridge, f"{anatomy.path}.{name}")
        error = held.error(tried)
        if error < best:
            best, chosen, change = error, ridge, tried
    if change is not None:
        before = weight.clone()
        weight.add_(change)
        after = _normal(weight)
        for _, tokens in _tokens(work, name, measuring):
            after.add(*tokens)
        best = after.energy / held.energy
        if not best < 1:
            best, chosen = 1.0, 0.0
            weight.copy_(before)
    work.metrics |= {"refit": best, "refit.ridge": chosen}


def _tokens(
    work: BlockWork, name: str, batches: Iterable[int]
) -> Iterator[tuple[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """Batch by batch, of its tokens that are no padding: what enters the linear ``name`` of the
    last block, what the block's output misses of its target, and the target."""
    seen: list[torch.Tensor] = []
    linear = work.blocks[-1].get_submodule(name)
    hook = linear.register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
    try:
        with ExitStack() as stack:
            for block in work.blocks:
                stack.enter_context(computing(block, work.compute))
            for batch in batches:
                work.guard()
                states = work.inputs.read(batch).to(work.device)
                for block, calls in zip(work.blocks, work.calls, strict=True):
                    states = calls[batch](block, states)
                target = work.targets.read(batch).to(work.device)
                inputs, missing, wanted = (
                    work.calls[-1][batch].tokens(values).flatten(0, -2).float()
                    for values in (seen.pop(), target - states, target)
                )
                yield batch, (inputs, missing, wanted)
    finally:
        hook.remove()


def fitting_bytes(shapes: Shapes) -> int:
    """Normal equations twice; in float64 the matrix, its factor and the solution."""
    return max(8 * width * (width + out) + 24 * width * (width + out) for out, width in shapes)


def _normal(weight: torch.Tensor) -> _Normal:
    out, width = weight.shape
    return _Normal(weight.new_zeros(width, width), weight.new_zeros(out, width))
