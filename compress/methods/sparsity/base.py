"""The options and checks that all one-shot pruners of single weights share."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field, field_validator, model_validator

from compress.errors import CompressError
from compress.linear.pattern import UNSTRUCTURED, Pattern
from compress.methods.base import VALUES, ZEROS, LinearMethod
from compress.methods.passes import Effort, Shapes
from compress.methods.work import SiteWork
from compress.models.anatomy import Anatomy
from compress.models.outline import LinearOutline, Outline


def lowest_mask(score: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Drop the floor(sparsity * n) lowest scores of each row of [rows, n]; True = kept."""
    drop = int(sparsity * score.shape[1])
    mask = torch.ones_like(score, dtype=torch.bool)
    if drop:
        lowest = score.topk(drop, dim=1, largest=False, sorted=False).indices
        mask.scatter_(1, lowest, False)
    return mask


class ZeroingMethod(LinearMethod):
    """A method that leaves zeros in linears, in N:M groups or anywhere."""

    writes: ClassVar[frozenset[str]] = frozenset({VALUES, ZEROS})

    pattern: str

    @property
    def parsed(self) -> Pattern | None:
        """The N:M pattern, None where the zeros may lie anywhere."""
        return None if self.pattern == UNSTRUCTURED else Pattern.parse(self.pattern)

    @property
    def share(self) -> float:
        """Share of weights that become zero."""
        return self.parsed.sparsity

    def check(self, anatomy: Anatomy, outline: Outline) -> None:
        super().check(anatomy, outline)
        group = self.parsed.m if self.parsed else 1
        for block in outline.blocks:
            for site in block.anatomy.sites:
                for name in self.targets(block.anatomy, site):
                    linear, label = block.linears[name], f"{block.anatomy.path}.{name}"
                    if linear.weights and not linear.matrices:
                        raise CompressError(
                            "linears, or layers made of linears",
                            f"a layer of kind {linear.layer} at {label}",
                            "Exclude it, or put this step before the one that made it",
                        )
                    odd = [width for _, width in linear.matrices if width % group]
                    if odd:
                        raise CompressError(
                            f"input widths divisible by {group} for the pattern {self.pattern}",
                            f"{odd[0]} at {label}",
                            "Exclude this layer, choose another pattern, or give an earlier width "
                            f"or low-rank step a multiple of {group}",
                        )

    def predict(self, outline: Outline) -> Outline:
        def change(linear: LinearOutline) -> LinearOutline:
            return replace(linear, density=min(linear.density, 1 - self.share))

        return self.predict_linears(outline, change)


class SparsityMethod(ZeroingMethod):
    """Options and checks of every one-shot pruner of single weights."""

    pattern: str = Field(
        UNSTRUCTURED,
        description="`unstructured`, or `N:M`: N weights stay in every M consecutive inputs "
        "(2:4 is what NVIDIA's sparse tensor cores run).",
    )
    sparsity: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Share of weights to zero, for unstructured patterns (default 0.5). N:M "
        "patterns fix it themselves.",
    )

    @field_validator("pattern")
    @classmethod
    def _pattern_parses(cls, value: str) -> str:
        if value == UNSTRUCTURED:
            return value
        try:
            return str(Pattern.parse(value))
        except CompressError as error:
            raise ValueError(f"'{UNSTRUCTURED}' or {error.expected}") from None

    @model_validator(mode="after")
    def _one_of_two(self):
        if self.parsed is not None and self.sparsity is not None:
            raise ValueError(
                f"pattern {self.pattern} fixes the sparsity at {self.share:g}; leave sparsity out"
            )
        return self

    @property
    def share(self) -> float:
        """Share of weights that become zero."""
        if self.parsed is not None:
            return self.parsed.sparsity
        return 0.5 if self.sparsity is None else self.sparsity

    def solving_bytes(self, shapes: list[tuple[int, int]], gram: bool) -> int:
        # Scores and the mask; a threshold over a whole matrix sorts pairs of values and indices.
        return (12 if self.parsed is not None else 28) * max(out * width for out, width in shapes)

    def solving_work(self, shapes: Shapes) -> Effort:
        # Scores, the order of them, masks.
        return Effort(moved=80.0 * sum(out * width for out, width in shapes))

    def mask(self, score: torch.Tensor) -> torch.Tensor:
        """Boolean mask [rows, columns] of what stays, by rows or N:M groups of ``score``."""
        if self.parsed is not None:
            return self.parsed.mask(score)
        return lowest_mask(score, self.share)

    def apply_mask(self, work: SiteWork, name: str, mask: torch.Tensor) -> None:
        """Zero what the mask does not keep and note it on the module for later steps."""
        work.weight(name).masked_fill_(~mask, 0)  # a product would leave negative zeros
        self.mark(work, name)

    def mark(self, work: SiteWork, name: str) -> None:
        if self.share > 0:
            work.linear(name).zeros = self.pattern
