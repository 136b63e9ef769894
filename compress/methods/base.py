"""What a compression method is: a frozen set of options, and functions on one block or one model.

A method touches no files, prints nothing and keeps no state. It declares what it reads and writes
(that is how a plan knows which orders work) and what it wants to know about the inputs of each
linear; the engine in :mod:`compress.engine.steps` brings it the blocks, one at a time.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import nn

from compress.errors import CompressError
from compress.linear.layer import parts_of
from compress.linear.matrix import matrix
from compress.linear.statistics import NOTHING, InputStatistics
from compress.methods.learning import BlockWork, Learning, ModelWork
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


@dataclass
class SiteWork:
    """One site of one block, as a method gets it to solve.

    Attributes:
        block, anatomy, site: where it is.
        names: the linears of the site that the step targets.
        statistics: of the inputs, by linear; linears of one site share an object. Empty for
            methods that need none.
        decision: what the method's ``decide`` returned, None where it has none.
        storage_dtype: what the checkpoint stores floats in; scales must survive the rounding to it.
        kept_columns: set by a method that removed input features of an output projection: the
            indices that stay (the engine narrows the stored activations accordingly).
        learned: what :meth:`Method.settle` returned for this block in an earlier pass of the step.
        metrics: figures for the journal, set by the method.
    """

    block: nn.Module
    anatomy: BlockAnatomy
    site: Site
    names: tuple[str, ...]
    statistics: dict[str, InputStatistics] = field(default_factory=dict)
    decision: Any = None
    storage_dtype: torch.dtype = torch.float32
    kept_columns: torch.Tensor | None = None
    learned: dict[str, torch.Tensor] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    def linear(self, name: str) -> nn.Module:
        return self.block.get_submodule(name)

    def weight(self, name: str) -> torch.Tensor:
        """The weight as a matrix [out, in] that writes through to the module."""
        return matrix(self.linear(name))

    def replace(self, name: str, module: nn.Module) -> None:
        """Put another module in the place of a linear."""
        parent, _, leaf = name.rpartition(".")
        setattr(self.block.get_submodule(parent), leaf, module)

    def groups(self) -> Iterator[tuple[list[str], InputStatistics | None]]:
        """Yield targeted linears that read the same input, with the statistics of that input.

        A layer counts as the linears that it is made of. Each reads what the one before it makes,
        so it comes afterwards, with statistics carried through the others as they are by then.
        """
        by_statistics: dict[int, tuple[InputStatistics | None, list[str]]] = {}
        for name in self.names:
            stats = self.statistics.get(name)
            first = parts_of(self.linear(name), name)[:1]
            by_statistics.setdefault(id(stats), (stats, []))[1].extend(first)
        for stats, paths in by_statistics.values():
            yield paths, stats
        for name in self.names:
            layer, stats = self.linear(name), self.statistics.get(name)
            for number, path in enumerate(parts_of(layer, name)[1:], 1):
                yield [path], None if stats is None else layer.carried(stats, number)

    def label(self, name: str) -> str:
        """How to name a linear in a message."""
        return f"{self.anatomy.path}.{name}"


@dataclass
class BlockSurvey:
    """What a survey saw of one uncompressed block.

    Attributes:
        statistics: by linear, for the sites the method asked for.
        influence: 1 - mean cosine similarity between the block's input and output (ShortGPT).
        block: the block itself, valid during ``observe`` only.
    """

    anatomy: BlockAnatomy
    block: nn.Module
    statistics: dict[str, InputStatistics]
    influence: float


class Method(BaseModel):
    """Base of all methods; its fields are the options of a recipe step.

    Class attributes:
        name: what recipes call it. summary: one line. source: paper and section or equation.
        works_on: ``block`` (streams) or ``model`` (decides with the whole model in memory).
        reads, writes: which of values, zeros, width, depth, modules, precision.
        needs: ``nothing``, ``calibration``, ``training`` or ``labels``.
        example: options that make a valid step of a method that has none by default.
        surveys: True when a pass over the uncompressed model precedes (see ``observe``/``decide``).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    works_on: ClassVar[str] = "block"
    reads: ClassVar[frozenset[str]] = frozenset({VALUES})
    writes: ClassVar[frozenset[str]]
    needs: ClassVar[str] = "calibration"
    example: ClassVar[dict[str, Any]] = {}

    @property
    def surveys(self) -> bool:
        return False

    @property
    def learns(self) -> Learning | None:
        """How gradients take part in the step; None where they do not."""
        return None

    def check(self, anatomy: Anatomy, outline: Outline) -> None:
        """Refuse a model that the step cannot work on, before any weight is read.

        Raises:
            CompressError: with the reason and the way out.
        """

    def files(self) -> tuple[Path, ...]:
        """Files that the options name; what they hold must not change while a run goes on."""
        return ()

    def predict(self, outline: Outline) -> Outline:
        """Return the outline of the model after the step."""
        raise CompressError(f"{self.name} to predict its result", "nothing", "Report this defect")

    def targets(self, block: BlockAnatomy, site: Site) -> tuple[str, ...]:
        """Linears of a site that the step changes."""
        return ()

    def statistic(self, site: Site) -> str:
        """What the method must know of a site's inputs: nothing, moments or gram."""
        return NOTHING

    def solve(self, work: SiteWork) -> None:
        """Change the linears of one site (and, for width, their producers) in place."""

    def learn_block(self, work: BlockWork) -> None:
        """Learn on one block whose sites have been solved, before its outputs are final."""

    def tune_block(self, work: BlockWork) -> None:
        """Learn on one block whose zeros are final; only called with ``learns.tunes``."""

    def learn_model(self, work: ModelWork) -> None:
        """Learn on the whole model, whose sites have been solved."""

    def settle(self, block: nn.Module, dense: bool = False) -> dict[str, torch.Tensor]:
        """End learning on a block: put its linears back as the step leaves them.

        Args:
            dense: put them back as they were instead.

        Returns:
            With ``dense``, what was learned, by linear: later passes of the step find it in
            ``SiteWork.learned``.
        """
        return {}

    def update_statistic(self, site: Site) -> str:
        """What :meth:`update` must know of a site's inputs; only called with ``learns.updates``."""
        return NOTHING

    def update(self, work: SiteWork) -> None:
        """After learning: change the weights of one site whose zeros are final."""

    def survey_statistic(self, site: Site) -> str:
        """What a survey must collect for a site."""
        return NOTHING

    def observe(self, survey: BlockSurvey) -> Any:
        """Condense one surveyed block into a small JSON-able note."""
        return None

    def decide(self, notes: list[Any], anatomy: Anatomy) -> Any:
        """Turn the notes of all blocks into a JSON-able decision that ``solve`` is given."""
        return None

    def decide_on_model(
        self, model: nn.Module, anatomy: Anatomy, batches: list[dict[str, torch.Tensor]]
    ) -> Any:
        """For methods that work on the ``model``: decide with all of it in memory."""
        return None

    def kept_blocks(self, decision: Any, anatomy: Anatomy) -> list[int] | None:
        """Indices of the blocks that stay, in order; None where the depth does not change."""
        return None

    def learning_tokens(self, tokens_per_batch: int, length: int) -> tuple[int, int]:
        """Tokens that go forwards and backwards through each block by itself, and through the whole
        model, all training steps together.

        Args:
            tokens_per_batch: of a calibration batch. length: tokens of a sequence.
        """
        return 0, 0

    def learning_bytes(self, weights: int) -> int:
        """Memory that learning holds for so many weights of linears beyond the weights."""
        return 0

    def learning_dtype(self, device: torch.device) -> torch.dtype:
        """Type of the matrix products of learning."""
        return torch.float32

    def solving_bytes(self, shapes: list[tuple[int, int]], gram: bool) -> int:
        """Memory that solving one site takes at its peak beyond the block and the statistics.

        Args:
            shapes: (out, in) of the linears that the step targets there.
            gram: the statistics hold a Gram matrix, another one of [in, in] floats.
        """
        largest = max(out * width for out, width in shapes)
        return 12 * largest

    def solving_work(self, shapes: list[tuple[int, int]]) -> float:
        """What solving one site takes, in multiply-accumulates of float32 matrix products that
        would take as long."""
        return 100.0 * sum(out * width for out, width in shapes)

    def survey_work(self, outline: Outline) -> float:
        """Forward passes over the calibration batches that precede the streaming pass."""
        return 1.0 if self.surveys else 0.0

    def head_work(self, outline: Outline) -> float:
        """How often the calibration batches pass through the model's head."""
        return 0.0


class LinearMethod(Method):
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
