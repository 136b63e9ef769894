"""A moment of training: how far it is, and the randomness that belongs to it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch


def derive_seed(*parts: int | str) -> int:
    """A seed below 2**63 from numbers and words; different parts give unrelated seeds."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True)
class Moment:
    """Where training is, as a loss function sees it.

    Everything random in a loss comes from here (or from torch's global generators, which the loop
    seeds from here before each micro-batch): it is a function of numbers that do not depend on how
    many processes there are, nor on whether training was interrupted.

    Attributes:
        step: from 0. steps: of the whole training.
        seed: of the training.
        micro: which micro-batch of the step, counted over all processes.
    """

    step: int
    steps: int
    seed: int
    micro: int = 0

    @property
    def progress(self) -> float:
        """Share of the steps that lie behind, from 0 to just below 1."""
        return self.step / self.steps

    def number(self, stream: int = 0, *, shared: bool = False) -> int:
        """A seed below 2**63 for one use of randomness.

        Args:
            stream: tells several uses in one loss apart.
            shared: the same number for all micro-batches of the step (noise that belongs to the
                step); else each micro-batch has its own.
        """
        return derive_seed(self.seed, self.step, -1 if shared else self.micro, stream)

    def generator(
        self, device: torch.device | str = "cpu", stream: int = 0, *, shared: bool = False
    ) -> torch.Generator:
        """A fresh generator on ``device``, seeded with :meth:`number`."""
        return torch.Generator(device).manual_seed(self.number(stream, shared=shared))
