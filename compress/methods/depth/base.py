"""What all methods that remove blocks have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import Field, model_validator

from compress.errors import CompressError
from compress.methods.base import DEPTH, Method
from compress.methods.passes import KeepBlocks, Pass, Survey
from compress.methods.work import BlockSurvey
from compress.models.anatomy import Anatomy
from compress.models.families import Family
from compress.models.outline import BlockOutline, Outline


class DepthMethod(Method):
    """Options and checks of block removal. A decision is ``{"removed": [block indices], ...}``."""

    writes: ClassVar[frozenset[str]] = frozenset({DEPTH})
    example: ClassVar[dict[str, Any]] = {"remove": 1}

    remove: int | None = Field(
        None, ge=0, description="Number of blocks to remove. Give this or `share`."
    )
    share: float | None = Field(
        None, ge=0, lt=1, description="Share of the blocks to remove, rounded to whole blocks."
    )
    protect_first: int = Field(0, ge=0, description="Blocks at the start that never go.")
    protect_last: int = Field(0, ge=0, description="Blocks at the end that never go.")

    @model_validator(mode="after")
    def _one_target(self):
        if (self.remove is None) == (self.share is None):
            raise ValueError("give either remove (a number of blocks) or share (of all blocks)")
        return self

    def count(self, blocks: int) -> int:
        """Number of blocks to remove from a model of ``blocks``."""
        return self.remove if self.remove is not None else int(self.share * blocks + 0.5)

    def candidates(self, blocks: int, family: Family) -> list[int]:
        """Indices of the blocks that may go."""
        first = max(self.protect_first, family.fixed_first)
        return list(range(first, blocks - self.protect_last))

    def check(self, anatomy: Anatomy, outline: Outline) -> None:
        check_countable(anatomy)
        blocks = len(outline.blocks)
        remove, free = self.count(blocks), len(self.candidates(blocks, anatomy.family))
        if self.share and not remove:
            raise CompressError(
                f"a share that removes at least one of {blocks} blocks",
                f"{self.share:g}",
                f"Raise share to {1 / blocks:.2g} or more",
            )
        if remove > min(free, blocks - 1):
            raise CompressError(
                f"at most {max(0, min(free, blocks - 1))} blocks to remove, so that one is left",
                f"{remove} of {blocks}, {blocks - free} of them protected",
                "Remove fewer blocks or protect fewer",
            )

    def predict(self, outline: Outline) -> Outline:
        """Blocks of one model are mostly alike: count those at the front of what may go as gone."""
        blocks = len(outline.blocks)
        family = outline.blocks[0].anatomy.family
        removed = self.candidates(blocks, family)[: self.count(blocks)]
        note = (
            f"{self.name}: which blocks go is decided while it runs; the plan counts them as equal"
        )
        notes = (*outline.notes, note) if removed else outline.notes
        return replace(without(outline, removed), notes=notes)

    def trials(self, anatomy: Anatomy) -> list[tuple[int, ...]]:
        """Blocks to take out in a trial, set by set, before any work: which go shows later, but
        what is built unlike the others comes first or last among those that may."""
        count = len(anatomy.blocks)
        free = self.candidates(count, anatomy.family) if self.count(count) else []
        return [(index,) for index in sorted({*free[:1], *free[-1:]})]

    def kept_blocks(self, decision: Any, anatomy: Anatomy) -> list[int]:
        """Indices of the blocks that stay, in order."""
        removed = set(decision["removed"])
        return [i for i in range(len(anatomy.blocks)) if i not in removed]


class SurveyDepthMethod(DepthMethod):
    """Block removal that looks at each block of the uncompressed model, then decides."""

    @abstractmethod
    def observe(self, survey: BlockSurvey) -> Any:
        """Condense one block of the uncompressed model into a small JSON-able note."""

    @abstractmethod
    def decide(self, notes: list[Any], anatomy: Anatomy) -> dict[str, Any]:
        """Turn the notes of all blocks into a decision."""

    def passes(self) -> tuple[Pass, ...]:
        return Survey(self.observe, self.decide), KeepBlocks(self.kept_blocks)


def check_countable(anatomy: Anatomy) -> None:
    """Raise a CompressError for a model whose blocks cannot become fewer."""
    if anatomy.family.shared_blocks:
        raise CompressError(
            "a model whose layers have weights of their own",
            f"{anatomy.model_type}, whose layers share one set",
            "Removing one of them would remove all; use a sparsity, precision or "
            "factorisation step",
        )
    if anatomy.family.fixed_layers:
        raise CompressError(
            "a model without weights that count its layers",
            f"{anatomy.model_type}, whose head has some for each of them",
            "Use another kind of step",
        )


def without(outline: Outline, removed: Collection[int]) -> Outline:
    """The outline of a model without these blocks."""
    stay = [block for i, block in enumerate(outline.blocks) if i not in removed]
    return replace(outline, blocks=tuple(renumbered(block, i) for i, block in enumerate(stay)))


def renumbered(block: BlockOutline, index: int) -> BlockOutline:
    path = f"{block.anatomy.path.rpartition('.')[0]}.{index}"
    return replace(block, anatomy=replace(block.anatomy, index=index, path=path))
