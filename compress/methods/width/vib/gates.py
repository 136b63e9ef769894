"""Stochastic gates: one a unit, z = mu + sigma * noise, with the price of what passes through.

A unit is a channel of the residual stream, a key/value head with its queries, a neuron of an FFN,
or a whole sub-layer. Its gate multiplies what it computes. The noise says how much of that the
model can do without: sigma^2 above mu^2 means that nothing but noise comes through, and the unit
can go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import nn

from compress.methods.base import HEADS, HIDDEN, NEURONS

# Kinds of gates beside those of channels, heads and neurons: scalars of whole sub-layers.
ATTENTION, FFN = "attention", "ffn"
KINDS = (HIDDEN, HEADS, NEURONS, ATTENTION, FFN)

OPEN, DRAWN, HARD = "open", "drawn", "hard"

_TINY = 1e-8
_MEAN, _SPREAD, _LOG_VARIANCE = 1.0, 0.01, -9.0  # of fresh gates, as TVA-Prune begins


class Gate(nn.Module):
    """The gates of all units of one kind, those of one block after those of the one before it.

    Parameters are float32 whatever the model is: a sigma of 0.01 beside a mu of 1 would be lost in
    16 bits.

    Args:
        counts: units of each block; of the one stream that all blocks share, a single number.
        generator: of the values that they begin with.
    """

    def __init__(
        self, counts: Sequence[int], generator: torch.Generator, device: torch.device
    ) -> None:
        super().__init__()
        self.bounds = [0, *accumulate(counts)]
        noise = torch.randn(2, self.bounds[-1], generator=generator).to(device)
        self.mean = nn.Parameter(_MEAN + _SPREAD * noise[0])
        self.log_variance = nn.Parameter(_LOG_VARIANCE + _SPREAD * noise[1])
        self.kept: torch.Tensor | None = None  # bool, once it is decided

    def log_alpha(self) -> torch.Tensor:
        """log(sigma^2 / mu^2) [units]: the larger, the less of a unit comes through."""
        return self.log_variance - (self.mean.square() + _TINY).log()

    def divergence(self) -> torch.Tensor:
        """KL of each gated unit from the best zero-mean prior, in nats [units].

        For an activation f the gate makes N(f mu, f^2 sigma^2). Against N(0, xi) with the xi that
        is best, the KL divergence is 1/2 log(1 + mu^2 / sigma^2), whatever f is.
        """
        return 0.5 * torch.log1p(self.mean.square() / (self.log_variance.exp() + _TINY))

    def soft(self, sharpness: float) -> torch.Tensor:
        """How much of each unit counts as kept [units]: a step at log alpha = 0, smoothed."""
        return torch.sigmoid(-sharpness * self.log_alpha())

    def of(self, values: torch.Tensor, block: int) -> torch.Tensor:
        """The part of a tensor [units] that belongs to a block."""
        return values[self.bounds[block] : self.bounds[block + 1]]


class Gates(nn.Module):
    """All gates of a model, and what state they are in.

    ``open``: they let everything pass, the model is what it was. ``drawn``: they multiply by
    mu + sigma * noise, fresh for each token. ``hard``: by mu where a unit is kept, by 0 elsewhere.

    Args:
        counts: kind -> units of each block; kinds that have no gates are left out.
    """

    def __init__(
        self, counts: Mapping[str, Sequence[int]], seed: int, device: torch.device
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.kinds = nn.ModuleDict(
            {kind: Gate(counts[kind], generator, device) for kind in KINDS if kind in counts}
        )
        # Multipliers of the constraint, which climb where all others descend.
        self.multipliers = nn.Parameter(torch.zeros(2, device=device))
        self.multipliers.register_hook(torch.neg)
        self.mode = OPEN
        self._means: dict[str, torch.Tensor] = {}
        self._deviations: dict[str, torch.Tensor] = {}
        self._channels: torch.Tensor | None = None

    def __getitem__(self, kind: str) -> Gate:
        return self.kinds[kind]

    def __contains__(self, kind: str) -> bool:
        return kind in self.kinds

    def draw(self, sharpness: float) -> None:
        """Be drawn at random from now on; called once before each forward pass.

        Args:
            sharpness: of the step by which channels count in norms.
        """
        self.mode = DRAWN
        self._means = {kind: gate.mean for kind, gate in self.kinds.items()}
        self._deviations = {k: (gate.log_variance / 2).exp() for k, gate in self.kinds.items()}
        self._channels = self[HIDDEN].soft(sharpness) if HIDDEN in self else None

    def keep(self, kept: Mapping[str, torch.Tensor]) -> None:
        """Decide what is kept: kind -> bool [units]."""
        for kind, gate in self.kinds.items():
            gate.kept = kept[kind].to(gate.mean.device)

    def harden(self) -> None:
        """Keep what is decided to be kept, and nothing else; likewise."""
        self.mode = HARD
        self._means = {kind: gate.mean * gate.kept for kind, gate in self.kinds.items()}
        self._channels = self[HIDDEN].kept.float() if HIDDEN in self else None

    def pass_all(self) -> None:
        """Be open."""
        self.mode = OPEN

    def gated(self, values: torch.Tensor, kind: str, block: int, size: int = 1) -> torch.Tensor:
        """Multiply [..., units * size] by the gates of a block, each of ``size`` neighbours alike.

        Every token gets noise of its own.
        """
        if self.mode == OPEN:
            return values
        gate = self[kind]
        mean = gate.of(self._means[kind], block)
        if self.mode == HARD:
            return (values.float() * mean.repeat_interleave(size)).to(values.dtype)
        noise = torch.randn(*values.shape[:-1], len(mean), device=values.device)
        factor = torch.addcmul(mean, noise, gate.of(self._deviations[kind], block))
        if size > 1:
            factor = factor.repeat_interleave(size, -1)
        return (values.float() * factor).to(values.dtype)

    def sublayer(self, values: torch.Tensor, kind: str, block: int) -> torch.Tensor:
        """Multiply all of [..., n] by the one gate of a sub-layer."""
        if self.mode == OPEN:
            return values
        mean = self[kind].of(self._means[kind], block)
        if self.mode == DRAWN:
            noise = torch.randn(*values.shape[:-1], 1, device=values.device)
            mean = mean + noise * self[kind].of(self._deviations[kind], block)
        return (values.float() * mean).to(values.dtype)

    def channels(self) -> torch.Tensor | None:
        """How much of each channel of the stream counts [hidden]; None where all of it does."""
        return None if self.mode == OPEN else self._channels

    def means(self) -> torch.Tensor:
        """What channels are multiplied by, without noise [hidden]."""
        return self._means[HIDDEN]

    def divergence(self, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Sum of the gates' KL divergences in nats, each times its weight."""
        return sum((gate.divergence() * weights[k]).sum() for k, gate in self.kinds.items())
