"""FuseGPT: blocks go one after the other, and their neighbours learn to take over what they did."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field

from compress.errors import CompressError
from compress.methods.base import DEPTH, VALUES
from compress.methods.depth.alike import check_plain
from compress.methods.depth.base import DepthMethod, renumbered
from compress.methods.depth.fuse.choosing import fusible, losable, window
from compress.methods.depth.fuse.grafting import merge_grafts
from compress.methods.depth.fuse.influence import macro_influence
from compress.methods.depth.fuse.learning import Loss, learn_group
from compress.methods.depth.refitting import RIDGES, fitting_bytes, refit
from compress.methods.passes import Learn, Rounds, Shapes, Stream, Survey
from compress.models.anatomy import Anatomy
from compress.models.outline import Outline
from compress.train.options import TrainingOptions
from compress.train.reconstruction import BlockWork


def _default_training() -> TrainingOptions:
    # A group's gradients are as small as its error, which nothing has to be clipped for.
    return TrainingOptions(
        steps=200, batch=2, micro_batch=1, learning_rate=1e-3, betas=(0.9, 0.95), clip=None
    )


class Fuse(DepthMethod):
    """Remove blocks one at a time and graft their weights onto the blocks around them.

    A round removes the block of the lowest Macro Influence: the one without which the last hidden
    states of the model, as it is by then, change least. In the group of blocks around it every
    linear becomes W + B A + (C_l C_r) * W_p, with W_p the weights of the block that goes, and
    learns, together with the norms, to return what the group returned. All of it is then merged,
    and the down projection of the group's last block fitted to what learning has left over (ours).
    The result is of the same architecture, and the next round finds plain weights.

    Blocks are fused with neighbours of their own sizes and layer type alone: what a weight of full
    attention stands for, one of sliding attention does not.
    """

    name: ClassVar[str] = "fuse"
    summary: ClassVar[str] = "remove blocks one at a time; their neighbours learn to replace them"
    source: ClassVar[str] = "Pei et al. 2024, FuseGPT, arXiv 2411.14507"
    writes: ClassVar[frozenset[str]] = frozenset({VALUES, DEPTH})

    group: int = Field(
        7, ge=1, description="Blocks around the one that goes which learn to replace it, at most. "
        "So many and one are in memory at once.",
    )  # fmt: skip
    rank: int = Field(
        128, ge=1, description="Of the coefficients C_l C_r and of the deltas B A; no more than a "
        "matrix has rows or columns.",
    )  # fmt: skip
    loss: Loss = Field(
        "mse", description="What makes a group's outputs like what they were. `mse`: the squared "
        "error of each token over its squared length. `kl`: the divergence of softmaxes over "
        "features, which sees the few largest features of a token and hardly any other. `kl_code`: "
        "over the sequences of a batch, as the released code has it; needs calibration.batch > 1.",
    )  # fmt: skip
    teacher: Literal["compressed", "original"] = Field(
        "compressed", description="Whose outputs the group learns: of the model as it enters the "
        "round, block and all, or of the model that the recipe began with.",
    )  # fmt: skip
    influence_batches: int | None = Field(
        32, ge=1, description="Calibration batches, at most, on which the influence is measured; "
        "null for all. A round costs about half a pass over the model for each of its blocks.",
    )  # fmt: skip
    batches: int | None = Field(
        None, ge=1, description="Calibration batches, at most, that groups learn from; null for "
        "all.",
    )  # fmt: skip
    delta_rate: float = Field(
        1e-4, gt=0, description="Learning rate of the deltas and of the norms; that of the "
        "coefficients is training.learning_rate. Both follow its schedule. The released code has "
        "9.65e-6, over 2,560 steps.",
    )  # fmt: skip
    training: TrainingOptions = Field(
        default_factory=_default_training,
        description="Of each group. A batch counts calibration batches.",
    )
    refit: bool = Field(
        True, description="After learning, fit the down projection of a group's last block, by "
        "least squares, to what the group is to return (not of the paper).",
    )  # fmt: skip

    def check(self, anatomy: Anatomy, outline: Outline) -> None:
        super().check(anatomy, outline)
        blocks = [block.anatomy for block in outline.blocks]
        free = self.candidates(len(blocks), anatomy.family)
        remove, most = self.count(len(blocks)), len(losable(blocks, free))
        if remove > most:
            raise CompressError(
                f"at most {most} blocks that can go into a neighbour of the same sizes and layer "
                "type (weights of full and of sliding attention stand for different functions)",
                f"{remove}",
                "Remove fewer blocks or protect fewer, or use shortgpt or sleb, which leave blocks "
                "as they are",
            )
        if remove:
            check_plain(self.name, outline.blocks)

    def predict(self, outline: Outline) -> Outline:
        """Blocks of one build weigh the same, whichever of them go."""
        blocks = [block.anatomy for block in outline.blocks]
        free = self.candidates(len(blocks), blocks[0].family)
        gone = losable(blocks, free)[: self.count(len(blocks))]
        stay = [block for i, block in enumerate(outline.blocks) if i not in gone]
        note = f"{self.name}: which blocks go is decided while it runs"
        return replace(
            outline,
            blocks=tuple(renumbered(block, i) for i, block in enumerate(stay)),
            notes=(*outline.notes, note) if gone else outline.notes,
        )

    def passes(self) -> tuple[Rounds, ...]:
        survey = Survey(
            macro_influence, self.decide, batches=self.influence_batches, detours=self.fusible
        )
        learn = Learn(self.learn, self.training, self._learning_bytes)
        fit = Learn(self.fit, None, fitting_bytes, forwards=1.05)
        stream = Stream(
            (learn, fit) if self.refit else (learn,),
            batches=self.batches,
            targets="original" if self.teacher == "original" else "prefix",
            settle=merge_grafts, groups=_others, spans=_span, most=self.group + 1, only=_group,
            share=lambda blocks: min(1.0, self.group / blocks),
        )  # fmt: skip
        return (Rounds((survey, stream), self.count),)

    def fusible(self, anatomy: Anatomy) -> list[int]:
        """The blocks that could go next."""
        free = self.candidates(len(anatomy.blocks), anatomy.family)
        return fusible(anatomy.blocks, free)

    def decide(self, notes: list[Any], anatomy: Anatomy) -> dict[str, Any]:
        """The block that goes, the group (first, end) with it, and the influence of each block that
        could have gone."""
        influence = {int(index): value for index, value in notes[-1].items()}
        # Of equals the later block goes: its error has fewer blocks left to grow in.
        removed = min(influence, key=lambda i: (influence[i], -i))
        return {
            "removed": removed, "group": window(anatomy.blocks, removed, self.group),
            "influence": [influence.get(i) for i in range(len(anatomy.blocks))],
        }  # fmt: skip

    def learn(self, work: BlockWork) -> None:
        learn_group(work, self.training, self.rank, self.delta_rate, self.loss)

    def fit(self, work: BlockWork) -> None:
        for block in work.blocks:
            merge_grafts(block)
        refit(work, RIDGES)

    def _learning_bytes(self, shapes: Shapes) -> int:
        weights = sum(out * width for out, width in shapes)
        thin = sum(2 * min(self.rank, out, width) * (out + width) for out, width in shapes)
        largest = max((out * width for out, width in shapes), default=0)
        # The weights that are multiplied by and their gradient; of what learns itself, gradient,
        # two averages of Adam, the start and the best so far; on the way to a weight, its terms.
        return 8 * weights + 24 * thin + 16 * largest


def _others(decision: dict[str, Any], anatomy: Anatomy) -> list[list[int]]:
    """All blocks but the one that goes, each by itself."""
    return [[i] for i in range(len(anatomy.blocks)) if i != decision["removed"]]


def _group(decision: dict[str, Any], _anatomy: Anatomy) -> list[int]:
    """The blocks of the group that stay, as they are counted afterwards."""
    first, end = decision["group"]
    return list(range(first, end - 1))


def _span(decision: dict[str, Any], anatomy: Anatomy) -> list[list[int]]:
    return [_group(decision, anatomy)]
