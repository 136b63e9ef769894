"""The blocks that a recipe names go. Needs no data."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from compress.errors import CompressError
from compress.methods.base import DEPTH, Method
from compress.methods.depth.base import check_countable, without
from compress.methods.passes import KeepBlocks, Pass
from compress.models.anatomy import Anatomy
from compress.models.outline import Outline


class DropBlocks(Method):
    """Remove the blocks with these indices, as slices of a passthrough merge leave them out.

    For blocks that were chosen elsewhere: by `compress inspect --similarity`, by an earlier run of
    another method, from a paper.
    """

    name: ClassVar[str] = "drop_blocks"
    summary: ClassVar[str] = "remove the blocks that are named; no data needed"
    source: ClassVar[str] = "no measure of its own; compare Gromov et al. 2024, arXiv 2403.17887"
    writes: ClassVar[frozenset[str]] = frozenset({DEPTH})
    needs: ClassVar[str] = "nothing"
    example: ClassVar[dict[str, Any]] = {"blocks": [1]}

    blocks: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        description="Indices of the blocks that go, counted from 0 in the model that enters the "
        "step.",
    )

    def check(self, anatomy: Anatomy, outline: Outline) -> None:
        check_countable(anatomy)
        count, fixed = len(outline.blocks), anatomy.family.fixed_first
        wrong = sorted(i for i in set(self.blocks) if not fixed <= i < count)
        if wrong:
            raise CompressError(
                f"blocks from {fixed} to {count - 1}", ", ".join(map(str, wrong)),
                "Name blocks that the model has, counted from 0"
                + (", behind those that the family needs at the start" if fixed else ""),
            )  # fmt: skip
        if len(set(self.blocks)) == count:
            raise CompressError(
                "at least one block that stays", f"all {count} named", "Name fewer blocks"
            )

    def predict(self, outline: Outline) -> Outline:
        return without(outline, self.blocks)

    def passes(self) -> tuple[Pass, ...]:
        return (KeepBlocks(self._kept),)

    def trials(self, _anatomy: Anatomy) -> list[tuple[int, ...]]:
        """The blocks that go, to take out in a trial before any work."""
        return [tuple(sorted(set(self.blocks)))] if self.blocks else []

    def _kept(self, _decision: Any, anatomy: Anatomy) -> list[int]:
        return [i for i in range(len(anatomy.blocks)) if i not in self.blocks]
