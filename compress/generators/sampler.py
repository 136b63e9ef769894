"""The sampler: one routine that fills masks step by step; its variants are options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.generators.corruption import draw
from compress.generators.denoiser import Counters, Denoiser
from compress.generators.description import ClassCondition, MaskedGeneration
from compress.generators.options import SamplerOptions
from compress.generators.ordering import NEVER, halton_ranks, highest, preference, propose
from compress.generators.rows import WHERE, Classes, Prompts, Start, start_rows
from compress.generators.schedules import reveal_plan, schedule_value


@dataclass(frozen=True)
class Samples:
    """What was sampled.

    Attributes:
        tokens: int64 [samples, length] on the CPU: whole rows, with conditions and special tokens.
        filled: bool like ``tokens``, what the sampler produced.
        counters: what it cost.
    """

    tokens: Tensor
    filled: Tensor
    counters: Counters

    @property
    def evaluations(self) -> float:
        """Network evaluations a sample; with guidance a step takes two."""
        return self.counters.rows / len(self.tokens)

    @property
    def generated(self) -> Tensor:
        """The produced tokens alone, [samples, tokens].

        Raises:
            CompressError: rows with different numbers of masks at the start.
        """
        counts = self.filled.sum(dim=1)
        if bool((counts != counts[0]).any()):
            raise CompressError(
                "rows with equally many masks", f"{int(counts.min())} to {int(counts.max())}",
                "Use tokens and filled", where=WHERE,
            )  # fmt: skip
        return self.tokens[self.filled].view(len(self.tokens), -1)


def sample(
    denoiser: Denoiser,
    options: SamplerOptions,
    *,
    count: int | None = None,
    prompts: Prompts | None = None,
    classes: Classes | None = None,
    rows: Tensor | None = None,
    length: int | None = None,
    seeds: int | Sequence[int] = 0,
    batch: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> Samples:
    """Sample from a masked generator.

    A row depends on its seed and its condition alone, not on the rows beside it (up to the rounding
    of the network, which a batch's size may change).

    Args:
        count: so many samples without a prompt (and of no class).
        prompts: token ids [samples, tokens] in front of what is generated, of one length.
        classes: a class a sample (its number, from 0; None for no class).
        rows: int64 [samples, length] with mask tokens to fill; visible tokens never change.
        length: tokens to generate, where the description leaves it open.
        seeds: a seed a row, or one for all, from which those of the rows are made.
        batch: rows at once.
        progress: called with (rows done, rows in all).

    Raises:
        CompressError: before any evaluation: options that do not fit the rows (more steps than
            masks, blocks that do not divide), a class that does not exist, an empty prompt, a
            sequence beyond the model's positions, guidance without a condition.
    """
    start = start_rows(
        denoiser, count=count, prompts=prompts, classes=classes, rows=rows, length=length
    )
    if batch < 1:
        raise CompressError("at least one row at once", f"batch {batch}", where=WHERE)
    generators = _generators(seeds, len(start.ids))
    filled = start.ids == denoiser.spec.mask_id
    plans = _plans(filled, options, denoiser.spec)
    if options.guidance:
        denoiser.unconditional(start.ids[:1], start.prompt[:1])  # refuses before any work
    before, parts = denoiser.counters.copy(), []
    for first in range(0, len(start.ids), batch):
        part = slice(first, first + batch)
        rows_ = Start(start.ids[part], start.prompt[part])
        filling = _Filling(denoiser, options, rows_, generators[part], plans and plans[part])
        parts.append(filling.run())
        if progress:
            progress(min(first + batch, len(start.ids)), len(start.ids))
    return Samples(torch.cat(parts), filled, denoiser.counters.since(before))


def _generators(seeds: int | Sequence[int], rows: int) -> list[torch.Generator]:
    numbers = [_mix(seeds, row) for row in range(rows)] if isinstance(seeds, int) else list(seeds)
    if len(numbers) != rows:
        raise CompressError(f"a seed for each of {rows} rows", f"{len(numbers)} seeds", where=WHERE)
    return [torch.Generator().manual_seed(int(number) % 2**63) for number in numbers]


def _mix(seed: int, row: int) -> int:
    """Unrelated seeds for the rows of neighbouring seeds (SplitMix64, Steele et al. 2014)."""
    value = (seed * 0x9E3779B97F4A7C15 + row + 1) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31


def _plans(
    unknown: Tensor, options: SamplerOptions, spec: MaskedGeneration
) -> list[tuple[tuple[int, int], ...]] | None:
    """What stays masked after each step, a row; None for ancestral sampling, which draws it."""
    if options.order == "ancestral":
        return None
    schedule = options.schedule_of(spec)
    counts = unknown.sum(dim=1).tolist()
    return [reveal_plan(count, options.steps, schedule, options.block) for count in counts]


class _Filling:
    """A batch of rows while it is filled."""

    def __init__(
        self,
        denoiser: Denoiser,
        options: SamplerOptions,
        start: Start,
        generators: list[torch.Generator],
        plans: list | None,
    ) -> None:
        self.denoiser, self.options, self.plans = denoiser, options, plans
        self.device = denoiser.device
        self.mask_id = denoiser.spec.mask_id
        self.ids = start.ids.to(self.device)
        self.prompt = start.prompt.to(self.device)
        self.generators = generators
        self.rank = self._ranks().to(self.device)
        unknown = self.ids == self.mask_id
        size = options.block or self.ids.shape[1]
        # Which block a mask belongs to; blocks count masks, not positions.
        self.block = torch.where(unknown, (unknown.cumsum(dim=1) - 1) // size, -1)
        self.step = [0] * len(self.ids)
        self.schedule = options.schedule_of(denoiser.spec)
        varies = options.guidance_schedule != "constant" and options.guidance > 0
        self.caching = options.order == "ancestral" and options.cache and not varies
        self.stored: Tensor | None = None
        self.changed = torch.ones(len(self.ids), dtype=torch.bool)

    def run(self) -> Tensor:
        """Fill all masks: int64 [rows, length] on the CPU."""
        while True:
            rows = (self.ids == self.mask_id).any(dim=1).nonzero()[:, 0].cpu()
            if not len(rows):
                return self.ids.cpu()
            self._advance(rows)

    def _advance(self, rows: Tensor) -> None:
        """One step of the rows that still have masks."""
        numbers = rows.tolist()
        logits = self._evaluate(rows)
        length = self.ids.shape[1]
        uniform = draw(len(rows), 2 * length, [self.generators[n] for n in numbers])
        for_tokens, for_order = uniform.to(self.device).split(length, dim=1)
        hidden = self.ids[rows] == self.mask_id
        if self.plans is not None:
            blocks = torch.tensor([self.plans[n][self.step[n]][0] for n in numbers])
            hidden &= self.block[rows] == blocks[:, None].to(self.device)
        steps = [self.step[n] for n in numbers]
        tokens, log_probs = self._propose(logits[hidden].double(), for_tokens, hidden, steps)
        if self.plans is None:
            reveal = hidden & (for_order >= self._stay(steps[0]))
        else:
            left = torch.tensor([self.plans[n][self.step[n]][1] for n in numbers])
            reveal = self._choose(hidden, left, tokens, log_probs, for_order, steps)
        proposals = torch.zeros_like(self.ids[rows])
        proposals[hidden] = tokens
        self.ids[rows] = torch.where(reveal, proposals, self.ids[rows])
        self.changed[rows] = reveal.any(dim=1).cpu()
        for number in numbers:
            self._next_step(number)

    def _evaluate(self, rows: Tensor) -> Tensor:
        """Logits of rows; with the cache only those that changed go through the network."""
        asked = rows[self.changed[rows]] if self.caching else rows
        if len(asked):
            steps = [self.step[n] for n in asked.tolist()]
            weight = torch.tensor([self.options.guidance_at(step) for step in steps])
            logits = self.denoiser.guided(self.ids[asked], weight, self.prompt[asked])
            if not self.caching:
                return logits
            if self.stored is None:
                self.stored = logits.new_empty(len(self.ids), *logits.shape[1:])
            self.stored[asked] = logits
        return self.stored[rows]

    def _propose(
        self, logits: Tensor, uniform: Tensor, hidden: Tensor, steps: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Tokens [n] and log-probabilities [n, vocabulary] for the n hidden positions."""
        if not bool(torch.isfinite(logits.logsumexp(dim=1)).all()):
            raise CompressError(
                "finite logits", "NaN or infinity",
                "The model is broken: check its weights for NaN and its dtype for overflow",
                where=WHERE,
            )  # fmt: skip
        options = self.options
        temperature = self._spread([options.temperature_at(s) for s in steps], hidden)
        tokens = propose(logits, uniform[hidden], temperature, options.top_k, options.top_p)
        return tokens, logits.log_softmax(dim=1)

    def _choose(
        self,
        hidden: Tensor,
        left: Tensor,
        tokens: Tensor,
        log_probs: Tensor,
        uniform: Tensor,
        steps: list[int],
    ) -> Tensor:
        """Which hidden positions are revealed: bool [rows, length]."""
        options = self.options
        noise = self._spread([options.order_temperature_at(s) for s in steps], hidden)
        places = self.rank.expand(hidden.shape)[hidden]
        wanted = preference(options.order, log_probs, tokens, uniform[hidden], noise, places)
        scores = torch.full(hidden.shape, NEVER, dtype=torch.float64, device=self.device)
        scores[hidden] = wanted
        # With a threshold a row may be ahead of its plan; each step reveals a token anyway.
        counts = (hidden.sum(dim=1) - left.to(self.device)).clamp_min(1)
        reveal = highest(scores, counts) & hidden
        if options.threshold is not None:
            sure = torch.zeros_like(hidden)
            sure[hidden] = log_probs.gather(1, tokens[:, None])[:, 0].exp() >= options.threshold
            reveal |= sure
        return reveal

    def _spread(self, values: list[float], hidden: Tensor) -> Tensor:
        """A value a row to a value a hidden position."""
        column = torch.tensor(values, dtype=torch.float64, device=self.device)[:, None]
        return column.expand(hidden.shape)[hidden]

    def _stay(self, step: int) -> float:
        """Probability that a mask stays: (1 - alpha_s) / (1 - alpha_t) (Sahoo et al. 2024, eq. 6).

        The last step goes to t = 0, where nothing is masked.
        """
        share, length = self.options.steps, self.ids.shape[1]
        now = schedule_value(self.schedule, step / share, length)
        return schedule_value(self.schedule, (step + 1) / share, length) / now

    def _next_step(self, row: int) -> None:
        self.step[row] += 1
        if self.plans is None or self.options.threshold is None:
            return
        plan, unknown = self.plans[row], self.ids[row] == self.mask_id
        while self.step[row] < len(plan):  # blocks that are full already take no more steps
            if bool((unknown & (self.block[row] == plan[self.step[row]][0])).any()):
                return
            self.step[row] += 1

    def _ranks(self) -> Tensor:
        """Places of all positions in a fixed order, [length]."""
        length, spec = self.ids.shape[1], self.denoiser.spec
        if self.options.order != "halton":
            return torch.arange(length)
        patches = torch.ones(length, dtype=torch.bool)
        if isinstance(spec.condition, ClassCondition):
            patches[spec.condition.position] = False
        if spec.grid is None or int(patches.sum()) != spec.grid[0] * spec.grid[1]:
            return halton_ranks(1, length)
        ranks = torch.full((length,), length)
        ranks[patches] = halton_ranks(*spec.grid)
        return ranks
