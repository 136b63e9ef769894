"""Distributions over the legal N:M masks of a weight, and linears that draw masks from them.

Every M consecutive weights along the input dimension are a *group* with C = C(M, N) legal masks; a
group's logits are a categorical distribution over them. Training draws relaxed masks from it
(Gumbel-softmax), evaluation takes the most probable one. Fang et al. 2024 (MaskLLM, arXiv
2409.17481), equations 4-10.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from compress.linear.matrix import matrix
from compress.linear.pattern import Pattern
from compress.methods.sparsity.maskllm.soft import Noise, candidates, masked_weight


def initial_logits(
    pattern: Pattern,
    groups: int,
    *,
    prior: torch.Tensor | None,
    alpha: float,
    std: float,
    generator: torch.Generator,
    exact: bool = False,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Logits [C, groups] to start from (equations 9 and 10).

    Normal noise, plus ``alpha`` times its standard deviation times how many kept weights a
    candidate shares with the prior mask, centred over the candidates.

    Args:
        prior: bool [out, in] with N kept in every group, or None for no preference.
        alpha: strength of the prior; from 5 on hardly a group starts with another mask.
        std: of the noise.
        generator: on ``device``.
        exact: let the noise change nothing about which mask is the most probable at the start.
    """
    shape = (pattern.candidates, groups)
    logits = torch.randn(shape, generator=generator, device=device).mul_(std)
    if prior is not None and (alpha > 0 or exact):
        shared = candidates(pattern).to(device) @ prior.reshape(groups, pattern.m).t().float()
        logits.add_(shared - pattern.n**2 / pattern.m, alpha=alpha * float(logits.std()))
        if exact:
            wanted = shared.argmax(0, keepdim=True)
            highest, found = logits.max(0, keepdim=True)
            logits.scatter_(0, found, logits.gather(0, wanted)).scatter_(0, wanted, highest)
    return logits


def hard_mask(logits: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """The most probable mask of each group, bool [G, M], from logits [C, G]."""
    return (
        candidates(pattern).to(logits.device).bool()[logits.max(0).indices]
    )  # many times faster than argmax


@dataclass(frozen=True)
class Draw:
    """How masks are drawn at one moment of training.

    Attributes:
        kappa, tau: see :func:`compress.methods.sparsity.maskllm.soft.masked_weight`.
        seed: of the noise, the same for all processes; None for none.
    """

    kappa: float
    tau: float
    seed: int | None = None


class MaskedLinear(nn.Module):
    """A linear whose weight, frozen, is multiplied by a mask that is being learned.

    It stands in the place of the linear while masks are learned and is taken out afterwards. What
    its forward multiplies by is ``mode``:

    - a :class:`Draw`: a relaxed random mask; gradients flow to ``logits``;
    - ``"hard"``: the most probable mask, no noise;
    - ``"dense"``: no mask at all (the teacher of a distillation).

    The dense weight itself is never written to. Where kept weights are to change, they change in a
    copy, ``kept``, that takes its place under the mask (see :meth:`open_weight`).

    Args:
        inner: the linear (``nn.Linear`` or GPT-2's ``Conv1D``); its parameters stop requiring
            gradients and are never written to.
        pattern: N:M; M divides the number of input features.
        logits: [C, out * in / M], float32.
        stream: tells this module's noise from other modules'.
    """

    def __init__(
        self, inner: nn.Module, pattern: Pattern, logits: torch.Tensor, stream: int = 0
    ) -> None:
        super().__init__()
        self.inner, self.pattern, self.stream = inner.requires_grad_(False), pattern, stream
        self.logits = nn.Parameter(logits)
        self.mode: Draw | str = "hard"
        self.kept: nn.Parameter | None = None
        self._drawn: torch.Tensor | None = None

    @property
    def dense(self) -> torch.Tensor:
        """The weight [out, in], a view of what the linear holds."""
        return matrix(self.inner)

    def mask(self) -> torch.Tensor:
        """The most probable mask, bool [out, in]."""
        return hard_mask(self.logits.detach(), self.pattern).reshape(self.dense.shape)

    def weight(self) -> torch.Tensor:
        """The weight [out, in] as ``mode`` masks it."""
        if self.mode == "dense":
            return self.dense
        if self.mode == "hard":
            return (self.dense if self.kept is None else self.kept) * self.mask()
        # Numbers, not the state of a generator: recomputing a forward draws the same noise.
        noise = None if self.mode.seed is None else Noise(self.mode.seed, self.stream)
        kappa, tau = self.mode.kappa, self.mode.tau
        return masked_weight(self.dense.detach(), self.logits, self.pattern, kappa, tau, noise)

    def open_weight(self, value: torch.Tensor | None = None) -> nn.Parameter:
        """Let the kept weights change, from ``value`` [out, in] on (default: as they are)."""
        if self.kept is None or value is not None:
            start = self.dense if value is None else value
            self.kept = nn.Parameter(start.detach().clone())
            zeros = self.dense == 0
            if bool(zeros.any()):  # of an earlier step: they stay
                self.kept.register_hook(lambda gradient: gradient.masked_fill(zeros, 0))
        self.drop()
        return self.kept

    def settle(self, dense: bool = False) -> nn.Module:
        """The linear itself, its weights masked (and changed) for good, or ``dense`` as before."""
        if not dense:
            with torch.no_grad():
                self.mode = "hard"
                self.dense.copy_(self.weight()).masked_fill_(~self.mask(), 0)
            if self.pattern.sparsity:
                self.inner.zeros = str(self.pattern)
        return self.inner

    def hold(self) -> None:
        """Compute the weight once for several forwards to come, until :meth:`drop`."""
        self._drawn = self.weight()

    def held(self) -> torch.Tensor:
        """The weight that the next forward multiplies by."""
        if self._drawn is None:
            self.hold()
        return self._drawn

    def drop(self) -> None:
        """Forget the weight that :meth:`hold` computed."""
        self._drawn = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight() if self._drawn is None else self._drawn
        return functional.linear(x, weight, self.inner.bias)


def linear_schedule(ends: tuple[float, float], progress: float) -> float:
    """From ``ends[0]`` at progress 0 to ``ends[1]`` at 1."""
    return ends[0] + (ends[1] - ends[0]) * progress


def masked_linears(module: nn.Module) -> dict[str, MaskedLinear]:
    """Paths of all masked linears inside a module."""
    return {n: m for n, m in module.named_modules() if isinstance(m, MaskedLinear)}


def set_mode(linears: dict[str, MaskedLinear], mode: Draw | str) -> None:
    """Make all linears multiply by the same kind of mask."""
    for linear in linears.values():
        linear.drop()
        linear.mode = mode
