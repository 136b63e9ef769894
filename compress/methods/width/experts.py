"""Fewer experts: of a mixture, those that contribute least go, and the router's rows with them."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from compress.errors import CompressError
from compress.methods.base import EXPERTS, PRECISION, WIDTH, Method
from compress.methods.passes import Pass, Sites, Stream, Survey
from compress.methods.width.contributions import Contributions
from compress.methods.work import BlockSurvey, SiteWork
from compress.models.anatomy import Anatomy, BlockAnatomy, Site
from compress.models.mixtures import keep_experts
from compress.models.outline import BlockOutline, Outline


class DropExperts(Method):
    """Remove whole experts of a mixture, as many from every layer, so that a stock config says it.

    Experts are ranked within a layer of the dense model; nothing makes up for those that go. The
    tokens that were routed to them go to the next ones in the router's order. Where the weights of
    a token's experts do not sum to one (``norm_topk_prob: false``), those that stay also get the
    probability that the router gave to those that went.
    """

    name: ClassVar[str] = "drop_experts"
    summary: ClassVar[str] = "remove the experts of a mixture that contribute least to their layer"
    source: ClassVar[str] = "Lasby et al. 2025, REAP, arXiv 2510.13999, its saliency"
    writes: ClassVar[frozenset[str]] = frozenset({WIDTH})
    spares: ClassVar[frozenset[str]] = frozenset({PRECISION})  # an expert goes or stays whole
    narrows: ClassVar[frozenset[str]] = frozenset({EXPERTS})
    example: ClassVar[dict[str, Any]] = {"share": 0.25}

    keep: int | None = Field(
        None, ge=1, description="Experts that stay in a layer. Give this or `share`."
    )
    share: float | None = Field(
        None, ge=0, lt=1, description="Share of a layer's experts to remove, rounded to whole ones."
    )
    importance: Literal["mean", "sum", "tokens"] = Field(
        "mean",
        description="`mean`: routing weight x norm of the output, mean over the tokens that an "
        "expert is sent (REAP); `sum`: the same summed up, so that how often it is chosen counts; "
        "`tokens`: how often it is chosen.",
    )

    @model_validator(mode="after")
    def _one_target(self):
        if (self.keep is None) == (self.share is None):
            raise ValueError("give either keep or share, the experts to leave or to remove")
        return self

    def kept(self, experts: int) -> int:
        """Number of experts that stay of so many."""
        return self.keep if self.keep is not None else experts - int(self.share * experts + 0.5)

    def check(self, anatomy: Anatomy, outline: Outline) -> None:
        mixtures = [block for block in outline.blocks if block.anatomy.experts]
        if not mixtures:
            raise CompressError(
                "a mixture of experts, with a router beside them that the toolkit recognises",
                f"none in {anatomy.model_type}", "Use ffn_width to narrow other FFNs",
            )  # fmt: skip
        for block in mixtures:
            self._check_block(block)

    def _check_block(self, block: BlockOutline) -> None:
        anatomy, kept = block.anatomy, self.kept(block.anatomy.experts)
        assert anatomy.mixture is not None
        name = next(n for n in block.linears if n.startswith(f"{anatomy.mixture.experts}."))
        least = max(1, round(block.linears[name].share * anatomy.experts))
        if anatomy.mixture.groups > 1:
            raise CompressError(
                "a router that chooses from all experts of a layer at once",
                f"one of {anatomy.path} that chooses among {anatomy.mixture.groups} groups first",
                "Use a sparsity, factorisation or precision step for this model",
            )
        if not least <= kept <= anatomy.experts:
            raise CompressError(
                f"{least} to {anatomy.experts} experts to keep: no fewer than a token is sent to, "
                f"no more than {anatomy.path} has",
                str(kept),
                f"Raise keep to {least}, or lower share" if kept < least else "Lower keep",
            )
        if kept == anatomy.experts and self.share:
            raise CompressError(
                f"a share that removes at least one of {anatomy.experts} experts",
                f"{self.share:g}", f"Raise share to {1 / anatomy.experts:.2g} or more",
            )  # fmt: skip

    def predict(self, outline: Outline) -> Outline:
        def fewer(block: BlockOutline) -> BlockOutline:
            return block.with_experts(self.kept(block.anatomy.experts)) if _mixed(block) else block

        return outline.map_blocks(fewer)

    def passes(self) -> tuple[Pass, ...]:
        survey = Survey(self.observe, self.decide, forwards=1.0)
        return survey, Stream((Sites(_experts, self.solve),), inputs=False)

    @torch.no_grad()
    def observe(self, survey: BlockSurvey) -> dict[str, list[float]]:
        """Tokens and weighted output norms of each expert; {} of a block without any."""
        mixture = survey.anatomy.mixture
        if mixture is None:
            return {}
        found = Contributions(survey.block, mixture)
        device = next(survey.block.parameters()).device
        with found.watching():
            for batch, call in enumerate(survey.calls):
                found.leave_out(call.real)
                call(survey.block, survey.inputs.read(batch).to(device))
        return {"tokens": found.tokens.tolist(), "weighted": found.weighted.tolist()}

    def decide(self, notes: list[Any], anatomy: Anatomy) -> list[list[int]]:
        """Return the experts that stay of each block, none of a block without any."""
        return [
            self._best(note, block.experts) if block.experts else []
            for note, block in zip(notes, anatomy.blocks, strict=True)
        ]

    def _best(self, note: dict[str, list[float]], experts: int) -> list[int]:
        tokens, scores = note["tokens"], note["weighted"]
        if self.importance == "tokens":
            scores = tokens
        elif self.importance == "mean":
            scores = [s / t if t else 0.0 for s, t in zip(scores, tokens, strict=True)]
        # Of equals the earlier one stays, so that the order of an unused router is kept.
        order = sorted(range(experts), key=lambda i: (-scores[i], i))
        return sorted(order[: self.kept(experts)])

    def solve(self, work: SiteWork) -> None:
        anatomy = work.anatomy
        kept = work.decision[anatomy.index]
        if len(kept) < anatomy.experts:
            keep_experts(work.block, anatomy.mixture, kept)
        work.metrics["experts"] = len(kept)

    def told(self, notes: list[Any]) -> tuple[str, ...]:
        silent = sum(note["tokens"].count(0) for note in notes if note and "tokens" in note)
        if not silent:
            return ()
        every = sum(len(note["tokens"]) for note in notes if note and "tokens" in note)
        return (f"{silent} of {every} experts were sent no token of the calibration",)


def _experts(block: BlockAnatomy, site: Site) -> tuple[str, ...]:
    """The linears of a block's experts that are in a site."""
    if block.mixture is None:
        return ()
    return tuple(n for n in site.linears if n.startswith(f"{block.mixture.experts}."))


def _mixed(block: BlockOutline) -> bool:
    return block.anatomy.experts > 0
