"""Which linear may lose how much, when all together are to take a given share of their bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import heapify, heappop, heappush

import torch

# Shares of its bytes that a linear may keep; between them nothing is told apart.
LEVELS = tuple(number / 20 for number in range(4, 21))


def losses(weight: torch.Tensor, norm: torch.Tensor) -> list[float]:
    """What a linear loses at each level: the share of sum |w_ij|^2 |x_j|^2 in its smallest terms.

    A stand-in for the error of a factorisation, which would have to be made to be known; like that
    it is convex in the level, and large where all weights matter alike.

    Args:
        weight: [out, in]. norm: root mean square of each input, [in].
    """
    energy = (weight * norm).square().flatten().sort(descending=True).values.double()
    total = float(energy.sum())
    if total == 0:
        return [0.0] * len(LEVELS)
    kept = energy.cumsum(0)
    return [1 - float(kept[max(0, round(x * len(kept)) - 1)]) / total for x in LEVELS]


def shared_out(
    curves: Mapping[str, Sequence[float]], sizes: Mapping[str, int], ratio: float
) -> dict[str, float]:
    """Levels with the least sum of losses at a total of ``ratio`` of the size, or just below.

    All linears begin at the lowest level; the next step up goes to the one whose loss falls most
    for what it weighs. Where curves are convex that is the optimum up to one step.

    Args:
        curves: name -> loss at each of ``LEVELS``. sizes: name -> weights.

    Returns:
        name -> level.
    """
    place = dict.fromkeys(curves, 0)
    left = (ratio - LEVELS[0]) * sum(sizes[name] for name in curves)

    def step(name: str) -> tuple[float, str]:
        """The next step of a linear: minus what it saves for each byte."""
        curve, at = curves[name], place[name]
        return (curve[at + 1] - curve[at]) / sizes[name], name

    ahead = [step(name) for name in curves]
    heapify(ahead)
    while ahead:
        _, name = heappop(ahead)
        cost = (LEVELS[1] - LEVELS[0]) * sizes[name]
        if cost > left + 1e-6:
            continue  # a smaller one may still have room
        place[name], left = place[name] + 1, left - cost
        if place[name] + 1 < len(LEVELS):
            heappush(ahead, step(name))
    return {name: LEVELS[i] for name, i in place.items()}
