"""Which units stay, from how little comes through each, so that the size is the one asked for."""

from __future__ import annotations

import hashlib
import heapq
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from compress.methods.base import HEADS, HIDDEN, NEURONS
from compress.methods.width.vib.gates import ATTENTION, FFN
from compress.methods.width.vib.sizes import Sizes

_NEAR = 0.995  # of the target: nearer than that, nobody looks further
_UNITS_OF = {ATTENTION: HEADS, FFN: NEURONS}


@dataclass(frozen=True)
class Choice:
    """What stays.

    Attributes:
        kept: kind -> bool [blocks][units] (of the stream one row): kinds that have gates.
        amount: the size with that, in what the target counts.
        threshold: log alpha from which on units go; 0 is where noise and signal are as large.
    """

    kept: dict[str, list[torch.Tensor]]
    amount: float
    threshold: float

    @property
    def cuts(self) -> bool:
        """Whether anything goes."""
        return not all(bool(row.all()) for rows in self.kept.values() for row in rows)

    @property
    def digest(self) -> str:
        """sha256 of what stays, in hexadecimal digits."""
        kept = {k: [row.int().tolist() for row in rows] for k, rows in sorted(self.kept.items())}
        return hashlib.sha256(json.dumps(kept).encode()).hexdigest()


@dataclass(frozen=True)
class Chooser:
    """Bisects a threshold over all units of all kinds, then fills up what is left of the size.

    Attributes:
        scores: kind -> log alpha [blocks][units] of kinds that have gates; of the stream one row.
        sizes: of the model. target: the largest size that is wanted.
        multiples: kind -> widths become multiples of this, or stay what they were.
        uniform: all blocks get one number of heads and one of neurons.
        queries: heads that a key/value head has. The number of heads that a config states divides
            the width of the stream, as LlamaConfig and others insist.
    """

    scores: Mapping[str, list[torch.Tensor]]
    sizes: Sizes
    target: float
    multiples: Mapping[str, int]
    uniform: bool = False
    queries: int = 1

    def choose(self) -> Choice:
        """The largest model within the target that a threshold leaves, filled up."""
        values = torch.cat([s for rows in self.scores.values() for s in rows]).unique()
        low, high = -1, len(values)  # too small or just right; too large
        if self._amount(self._above(float("inf"))) <= self.target:
            low = high
        while high - low > 1:
            middle = (low + high) // 2
            fits = self._amount(self._above(float(values[middle]))) <= self.target
            low, high = (middle, high) if fits else (low, middle)
        bounds = [float("-inf"), *values.tolist(), float("inf")]
        threshold = bounds[low + 1]
        counts = self._filled(self._above(threshold))
        if self._amount(counts) < _NEAR * self.target and low < len(values):
            # Large steps (of the stream, of heads): one too many, and neurons make room for it.
            other = self._drained(self._above(bounds[low + 2]))
            if self._amount(counts) < self._amount(other) <= self.target:
                counts, threshold = other, bounds[low + 2]
        kept = {
            kind: [_best(row, n) for row, n in zip(self.scores[kind], counts[kind], strict=True)]
            for kind in self.scores
        }
        return Choice(kept, self._amount(counts), threshold)

    def smallest(self) -> float:
        """The size of the smallest model that can be left."""
        return self._amount(self._above(float("-inf")))

    def _above(self, threshold: float) -> dict[str, list[int]]:
        """How many units of each block have a log alpha below a threshold, rounded and never none
        where their sub-layer stays."""
        counts = {
            kind: [int((row < threshold).sum()) for row in rows]
            for kind, rows in self.scores.items()
        }
        for whole, units in _UNITS_OF.items():
            if whole in counts and units in counts:
                # Without any unit a sub-layer is gone, whatever its own gate says.
                counts[whole] = [
                    min(n, here) for n, here in zip(counts[whole], counts[units], strict=True)
                ]
        if self.uniform:
            for kind in {HEADS, NEURONS} & counts.keys():
                mean = sum(counts[kind]) / len(counts[kind])
                counts[kind] = [int(mean + 0.5)] * len(counts[kind])
        rounded = {
            kind: found if kind in _UNITS_OF else [
                _rounded(n, len(row), self.multiples.get(kind, 1))
                for n, row in zip(found, self.scores[kind], strict=True)
            ]
            for kind, found in counts.items()
        }  # fmt: skip
        if HIDDEN in counts:
            left = rounded[HEADS] if self.uniform and HEADS in rounded else self.sizes.full[HEADS]
            heads = max(1, int(max(left)))
            step = math.lcm(self.multiples.get(HIDDEN, 1), heads * self.queries)
            # All channels are one choice only where the heads that stay divide them.
            whole = len(self.scores[HIDDEN][0])
            most = whole // step * step or whole
            rounded[HIDDEN] = [_rounded(counts[HIDDEN][0], most, step)]
        return rounded

    def _amount(self, counts: Mapping[str, list[int]]) -> float:
        found = {k: torch.tensor(v, dtype=torch.float64) for k, v in counts.items()}
        return float(self.sizes.amount(found))

    def _filled(self, counts: dict[str, list[int]]) -> dict[str, list[int]]:
        """Give back the most important units that still fit, so that nothing is left of the size
        that a unit of some block could use."""
        counts = {kind: list(found) for kind, found in counts.items()}
        heap: list[tuple[float, str, int]] = []
        refilled = {NEURONS} if self.uniform else {HEADS, NEURONS}
        for kind in sorted(refilled & counts.keys()):
            blocks = [0] if self.uniform else range(len(counts[kind]))
            for block in blocks:
                self._offer(heap, counts, kind, block)
        while heap:
            _, kind, block = heapq.heappop(heap)
            trial = {**counts, kind: list(counts[kind])}
            members = range(len(trial[kind])) if self.uniform else [block]
            for member in members:
                units = len(self.scores[kind][member])
                trial[kind][member] = self._next(trial[kind][member], units, kind)
            if self._amount(trial) <= self.target:
                counts = trial
                self._offer(heap, counts, kind, block)
        return counts

    def _drained(self, counts: dict[str, list[int]]) -> dict[str, list[int]]:
        """Take away the least important neurons until the rest is within the target."""
        counts = {kind: list(found) for kind, found in counts.items()}
        step = self.multiples.get(NEURONS, 1)
        while NEURONS in counts and self._amount(counts) > self.target:
            left = [
                (float(self._ordered[NEURONS][block][count - 1]), block)
                for block, count in enumerate(counts[NEURONS])
                if count > step
            ]
            if not left:
                break
            blocks = range(len(counts[NEURONS])) if self.uniform else [max(left)[1]]
            for block in blocks:
                count = counts[NEURONS][block]
                counts[NEURONS][block] = max(step, (count - 1) // step * step)
        return counts

    def _offer(
        self, heap: list[tuple[float, str, int]], counts: Mapping[str, list[int]], kind: str,
        block: int,
    ) -> None:  # fmt: skip
        """Put the next unit of a block among those that may come back."""
        whole = next(w for w, units in _UNITS_OF.items() if units == kind)
        gone = whole in counts and not counts[whole][block]
        count, row = counts[kind][block], self.scores[kind][block]
        if not gone and count < len(row):
            heapq.heappush(heap, (float(self._ordered[kind][block][count]), kind, block))

    def _next(self, count: int, units: int, kind: str) -> int:
        return min(units, count + self.multiples.get(kind, 1))

    @cached_property
    def _ordered(self) -> dict[str, list[torch.Tensor]]:
        return {kind: [row.sort().values for row in rows] for kind, rows in self.scores.items()}


def _rounded(count: int, units: int, step: int) -> int:
    """The nearest multiple, at least one of them; all units where there are no more."""
    return min(units, max(step, (count + step // 2) // step * step))


def _best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """bool [units]: the ``count`` units through which most comes."""
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[scores.argsort(stable=True)[:count]] = True
    return kept


def heads_by_order(scores: list[torch.Tensor]) -> list[tuple[int, int]]:
    """(block, head group) of all of them, those that go first in front."""
    found = [
        (float(value), block, unit)
        for block, row in enumerate(scores)
        for unit, value in enumerate(row)
    ]
    return [(block, unit) for _, block, unit in sorted(found, key=lambda f: (-f[0], *f[1:]))]
