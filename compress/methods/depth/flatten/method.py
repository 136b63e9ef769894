"""FlattenGPT: neighbouring blocks run side by side, in a block that gets its width again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from compress.errors import CompressError
from compress.linear.statistics import GRAM, MOMENTS
from compress.methods.base import DEPTH, HEADS, NEURONS, VALUES, WIDTH
from compress.methods.depth.alike import alike_runs, check_plain
from compress.methods.depth.base import DepthMethod, renumbered
from compress.methods.depth.flatten.choosing import choose_groups, removable
from compress.methods.depth.flatten.folding import obstacle
from compress.methods.depth.flatten.merging import flatten_blocks
from compress.methods.depth.flatten.restoring import restore_heads, restore_neurons
from compress.methods.depth.refitting import RIDGES, fitting_bytes, refit
from compress.methods.depth.similarity import Similarity, similarity_survey
from compress.methods.passes import Effort, Learn, Pass, Shapes, Sites, Stream
from compress.methods.work import SiteWork
from compress.models.anatomy import ATTENTION_OUT, DOWN, Anatomy, BlockAnatomy, Site
from compress.models.groups import Groups, single
from compress.models.outline import BlockOutline, Outline
from compress.train.reconstruction import BlockWork


class Flatten(DepthMethod):
    """Put neighbouring blocks whose inputs are alike side by side, then narrow them to one's width.

    The inputs of all blocks are compared on the calibration text; the pair of neighbours (or of
    groups made so far) whose first and last block read the most similar hidden states become one,
    until as many blocks are gone as wanted. Norms are folded into the linears, heads and neurons of
    the blocks concatenated. From the front on, each such block then keeps the key/value heads with
    the largest output-weighted norm and the neurons of highest ridge leverage, whose down
    projection takes over what the others did; the statistics are those of inputs that have passed
    the blocks flattened and narrowed before. At last the down projection, narrowed or not, is
    fitted to what the blocks of the group returned in the model as it was (ours). The result is of
    the same architecture.

    Blocks are put side by side exactly or not at all. That excludes

    - blocks of different layer types (sliding and full attention, say) or widths;
    - norms of queries and keys (Qwen3): the scale is one vector for all heads of a block, behind
      the projection, so no linear can take it, and the heads of two blocks would need two;
    - norms behind attention and FFN (Gemma 2): P(A_1) + P'(A_2) is no norm of A_1 + A_2;
    - post-norm blocks (BERT): h' = N(h + A(h)) puts scale and shift of N on the stream itself,
      where the next N normalises them together with what is added; no linear reads N(h) alone, and
      a block that adds nothing is no identity, so that even it could not be taken in without loss;
    - a shift of a norm in front of linears without biases (GPT-J): there is nothing to take it.
    """

    name: ClassVar[str] = "flatten"
    summary: ClassVar[str] = "put similar neighbouring blocks side by side, then restore the width"
    source: ClassVar[str] = "Xu et al. 2026, FlattenGPT, arXiv 2602.08858"
    writes: ClassVar[frozenset[str]] = frozenset({VALUES, DEPTH, WIDTH})
    narrows: ClassVar[frozenset[str]] = frozenset({HEADS, NEURONS})

    protect_first: int = Field(0, ge=0, description="Blocks at the start that stay as they are.")
    protect_last: int = Field(0, ge=0, description="Blocks at the end that stay as they are.")
    group: int = Field(
        3, ge=2, description="Blocks that become one, at most. Memory grows with it: so many are "
        "held at once, and the inputs of the FFN's output are as much wider.",
    )  # fmt: skip
    restore_width: bool = Field(
        True, description="Narrow the blocks to the width of one; without, no head or neuron is "
        "lost and the model only becomes shallower, with blocks of unequal width.",
    )  # fmt: skip
    ridge: Literal["auto"] | Annotated[float, Field(gt=0)] = Field(
        "auto", description="lambda of the neurons' leverage and of the correction, as a multiple "
        "of the mean eigenvalue of their covariance (the paper: 10). `auto`: for each block, out "
        "of 0.001 to 10, that with which the FFN's outputs on the calibration text change least.",
    )  # fmt: skip
    attention_correction: bool = Field(
        True, description="Fit the attention's output projection, too, to its old outputs by least "
        "squares; the paper leaves it alone.",
    )  # fmt: skip

    refit: bool = Field(
        True, description="Fit the down projection of each merged block, by least squares, to "
        "what the model that enters the step has behind the last block of the group (not of the "
        "paper).",
    )  # fmt: skip

    def makes(self) -> frozenset[str]:
        return self.writes - {WIDTH} if self.restore_width else self.writes

    def check(self, anatomy: Anatomy, outline: Outline) -> None:
        super().check(anatomy, outline)
        chosen = self.candidates(len(outline.blocks), anatomy.family)
        candidates = [outline.blocks[i] for i in chosen]
        reasons = [obstacle(block.anatomy) for block in candidates]
        if reasons and all(reasons):
            raise CompressError(
                "pre-norm blocks whose norms can be folded into the linears that read them",
                f"{anatomy.model_type}, {reasons[0]}",
                "Use shortgpt or sleb, which leave blocks as they are",
            )
        check_plain(self.name, candidates)
        if not self.restore_width and anatomy.family.fixed_heads:
            raise CompressError(
                "a family whose layers may have different numbers of heads",
                f"{anatomy.model_type}, whose code takes it from one place for all",
                "Set restore_width to true",
            )
        remove = self.count(len(outline.blocks))
        runs = self._runs([block.anatomy for block in outline.blocks])
        most = removable(single(len(outline.blocks)), runs, self.group)
        if remove > most:
            raise CompressError(
                f"at most {most} blocks that can become part of a neighbour of the same build and "
                f"layer type, {self.group} in a group at most", f"{remove}",
                "Remove fewer blocks, or raise `group`",
            )  # fmt: skip

    def predict(self, outline: Outline) -> Outline:
        """Blocks of one build weigh the same, whichever become one."""
        count = len(outline.blocks)
        runs = self._runs([block.anatomy for block in outline.blocks])
        groups = choose_groups([[1.0] * count] * count, runs, self.count(count), self.group)
        blocks = [self._merged([outline.blocks[i] for i in group]) for group in groups]
        note = f"{self.name}: which blocks become one is decided while it runs"
        return replace(
            outline,
            blocks=tuple(renumbered(block, i) for i, block in enumerate(blocks)),
            notes=(*outline.notes, note) if len(blocks) < count else outline.notes,
        )

    def _merged(self, blocks: list[BlockOutline]) -> BlockOutline:
        first = blocks[0]
        if self.restore_width:
            return first
        return first.with_widths({k: len(blocks) * v for k, v in first.anatomy.widths.items()})

    def passes(self) -> tuple[Pass, ...]:
        sites = Sites(
            self.targets, self.solve, self.statistic, memory=self.solving_bytes,
            work=self.solving_work,
        )  # fmt: skip
        fit = Learn(self.fit, None, self.fitting_bytes, forwards=1.05)
        actions = (sites,) * self.restore_width + (fit,) * self.refit
        stream = Stream(
            actions, groups=lambda d, _anatomy: d["groups"],
            merge=flatten_blocks, most=self._most, only=self._worked,
            share=lambda blocks: min(1.0, self.count(blocks) / blocks),
        )  # fmt: skip
        return similarity_survey(self.decide), stream

    def decide(self, similarity: Similarity, anatomy: Anatomy) -> dict[str, Any]:
        """Which blocks become one, and the matrix that says so."""
        remove, runs = self.count(len(anatomy.blocks)), self._runs(anatomy.blocks)
        groups = choose_groups(similarity, runs, remove, self.group)
        return {"groups": groups, "similarity": similarity}

    @property
    def _most(self) -> int:
        """Blocks in a group, at most."""
        return self.group if self.remove is None else max(1, min(self.group, self.remove + 1))

    def _runs(self, blocks: Sequence[BlockAnatomy]) -> list[list[int]]:
        """Neighbouring blocks of one build, any of which may become one."""
        chosen = self.candidates(len(blocks), blocks[0].family)
        return alike_runs(blocks, [index for index in chosen if not obstacle(blocks[index])])

    def _worked(self, decision: Any, _anatomy: Anatomy) -> list[int]:
        return [i for i, group in enumerate(decision["groups"]) if len(group) > 1]

    def targets(self, _block: BlockAnatomy, site: Site) -> tuple[str, ...]:
        return site.linears if site.kind in (ATTENTION_OUT, DOWN) else ()

    def statistic(self, site: Site) -> str:
        return GRAM if site.kind == DOWN or self.attention_correction else MOMENTS

    def solving_bytes(self, shapes: Shapes, gram: bool) -> int:
        """The shapes are those of one block, the linears those of a group."""
        ((out, width),) = shapes
        wide = self._most * width
        if not gram:
            return 16 * out * wide
        # The statistics' own size beyond one block's, a copy of it, and in float64 the matrix, its
        # factor and its inverse.
        return 4 * (wide**2 - width**2) + 36 * wide**2 + 16 * out * wide

    def solving_work(self, shapes: Shapes) -> Effort:
        """Of a pair, which most groups are."""
        ((out, width),) = shapes
        wide = 2 * width
        return Effort(len(self._ridges) * (2.0 * wide**3 + 4.0 * out * wide**2))

    def solve(self, work: SiteWork) -> None:
        groups: Groups = work.decision["groups"]
        (blocks,) = (len(group) for group in groups if group[0] == work.anatomy.index)
        if work.site.kind == DOWN:
            restore_neurons(work, blocks, self._ridges)
        else:
            restore_heads(work, blocks, self.attention_correction)

    def fitting_bytes(self, shapes: Shapes) -> int:
        """The shapes are those of one block; one that keeps its width is as wide as a group."""
        if self.restore_width:
            return fitting_bytes(shapes)
        return fitting_bytes([(out, self._most * width) for out, width in shapes])

    def fit(self, work: BlockWork) -> None:
        refit(work, RIDGES)

    @property
    def _ridges(self) -> tuple[float, ...]:
        return RIDGES if self.ridge == "auto" else (float(self.ridge),)
