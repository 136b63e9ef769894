"""What a compression method is: a frozen set of options, and functions on one block or one model.

A method touches no files, prints nothing and keeps no state. It declares what it writes
(that is how a plan knows which orders work) and what it wants to know about the inputs of each
linear; the engine in :mod:`compress.engine.steps` brings it the blocks, one at a time.
"""

from __future__ import annotations

import fnmatch
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from compress.errors import CompressError
from compress.linear.statistics import NOTHING
from compress.methods.passes import (
    Effort,
    Pass,
    Rounds,
    Shapes,
    Sites,
    Stream,
    little_memory,
    little_work,
)
from compress.methods.work import SiteWork
from compress.models.anatomy import Anatomy, BlockAnatomy, Site
from compress.models.outline import Outline
from compress.system import expressions

VALUES, ZEROS, WIDTH, DEPTH, MODULES, PRECISION = (
    "values",
    "zeros",
    "width",
    "depth",
    "modules",
    "precision",
)

HEADS, NEURONS, HIDDEN, EXPERTS = "heads", "neurons", "hidden", "experts"

CALIBRATION = "calibration"


class Method(BaseModel, ABC):
    """Base of all methods; its fields are the options of a recipe step.

    Class attributes:
        name: what recipes call it. summary: one line. source: paper and section or equation.
        writes: which of values, zeros, width, depth, modules, precision.
        spares: of these kinds, what the step leaves as it is wherever it meets it, although it
            changes what is beside it: no order is refused for them.
        needs: ``nothing`` or ``calibration``.
        narrows: of a method that writes width: which of heads, neurons, hidden (channels of the
            residual stream) and experts it takes away; each is tried on a miniature of families
            that nobody has described.
        example: options that make a valid step of a method that has none by default.
        approximate: by how much, as a share, the size that ``predict`` says may be off, of a
            method that decides while it runs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    writes: ClassVar[frozenset[str]]
    spares: ClassVar[frozenset[str]] = frozenset()
    needs: ClassVar[str] = CALIBRATION
    narrows: ClassVar[frozenset[str]] = frozenset()
    example: ClassVar[dict[str, Any]] = {}
    approximate: ClassVar[float] = 0.0

    def check(self, anatomy: Anatomy, outline: Outline) -> None:
        """Refuse a model that the step cannot work on, before any weight is read.

        Raises:
            CompressError: with the reason and the way out.
        """

    def files(self) -> tuple[Path, ...]:
        """Files that the options name; what they hold must not change while a run goes on."""
        return ()

    def makes(self) -> frozenset[str]:
        """What, out of ``writes``, a step with these options changes; by default all of it."""
        return frozenset(self.writes)

    def narrowing(self) -> frozenset[str]:
        """What, out of ``narrows``, a step with these options takes away; by default all of it."""
        return frozenset(self.narrows)

    def told(self, notes: list[Any]) -> tuple[str, ...]:
        """Sentences for the report.

        Args:
            notes: what the journal has of each pass and block, in order.
        """
        return ()

    @abstractmethod
    def predict(self, outline: Outline) -> Outline:
        """Return the outline of the model after the step."""

    @abstractmethod
    def passes(self) -> tuple[Pass | Rounds, ...]:
        """What the step does, in order."""


class SiteMethod(Method):
    """A method that changes the sites of each block, one after the other, in one pass."""

    @abstractmethod
    def targets(self, block: BlockAnatomy, site: Site) -> tuple[str, ...]:
        """Linears of a site that the step changes."""

    def statistic(self, site: Site) -> str:
        """What :meth:`solve` must know of a site's inputs (:mod:`compress.linear.statistics`)."""
        return NOTHING

    @abstractmethod
    def solve(self, work: SiteWork) -> None:
        """Change the linears of one site (and, for width, their producers) in place."""

    def solving_bytes(self, shapes: Shapes, gram: bool) -> int:
        """Memory that solving one site takes; see :class:`compress.methods.passes.Sites`."""
        return little_memory(shapes, gram)

    def solving_work(self, shapes: Shapes) -> Effort:
        """Work that solving one site takes; see :class:`compress.methods.passes.Sites`."""
        return little_work(shapes)

    @property
    def sites(self) -> Sites:
        """What is done to the sites of a block."""
        return Sites(
            self.targets, self.solve, self.statistic, memory=self.solving_bytes,
            work=self.solving_work,
        )  # fmt: skip

    def passes(self) -> tuple[Pass, ...]:
        return (Stream((self.sites,), inputs=self.needs == CALIBRATION),)


class LinearMethod(SiteMethod):
    """A method that changes linears one site at a time, with the usual targeting options."""

    include: tuple[str, ...] = Field(
        ("*",),
        description="Module paths to compress: shell patterns, or regular expressions after `re:`. "
        "Only linears inside blocks are ever matched.",
    )
    exclude: tuple[str, ...] = Field(
        (), description="Module paths to leave alone; wins over include. Same patterns."
    )

    @field_validator("include", "exclude")
    @classmethod
    def _expressions_parse(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            if pattern.startswith("re:"):
                expressions.check_expression(pattern[3:])
        return patterns

    def targets(self, block: BlockAnatomy, site: Site) -> tuple[str, ...]:
        return tuple(
            name
            for name in site.linears
            if matches(f"{block.path}.{name}", self.include)
            and not matches(f"{block.path}.{name}", self.exclude)
        )

    def check(self, anatomy: Anatomy, outline: Outline) -> None:
        paths = [f"{b.path}.{name}" for b in anatomy.blocks for name in b.linears]
        for pattern in (*self.include, *self.exclude):
            if pattern.startswith("re:"):
                expressions.search(pattern[3:], paths)  # all at once; the answers are remembered
        hit = any(self.targets(b, s) for b in anatomy.blocks for s in b.sites)
        if not hit:
            example = anatomy.blocks[0]
            raise CompressError(
                "include/exclude patterns that match a linear inside a block",
                f"include={list(self.include)} exclude={list(self.exclude)}, which match none",
                f"Paths look like {example.path}.{(example.linears or ('…',))[0]}",
            )

    def predict_linears(self, outline: Outline, change) -> Outline:
        """Apply ``change(LinearOutline) -> LinearOutline`` to every targeted linear."""

        def block_change(block):
            names = [n for s in block.anatomy.sites for n in self.targets(block.anatomy, s)]
            return block.with_linears({n: change(block.linears[n]) for n in names})

        return outline.map_blocks(block_change)


def matches(path: str, patterns: tuple[str, ...]) -> bool:
    """Whether a module path is meant by one of the patterns of include or exclude."""
    return any(
        expressions.search(p[3:], [path])[0]
        if p.startswith("re:")
        else fnmatch.fnmatchcase(path, p)
        for p in patterns
    )
