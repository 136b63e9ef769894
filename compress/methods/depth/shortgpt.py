"""ShortGPT: the blocks that change their input least go."""

from __future__ import annotations

from typing import Any, ClassVar

from compress.methods.depth.base import SurveyDepthMethod
from compress.methods.work import BlockSurvey
from compress.models.anatomy import Anatomy


class ShortGPT(SurveyDepthMethod):
    """Remove the blocks with the lowest Block Influence, all at once.

    The influence of a block is 1 - E[cos(input, output)] over the tokens of the calibration set:
    0 for a block that does nothing.
    """

    name: ClassVar[str] = "shortgpt"
    summary: ClassVar[str] = "remove the blocks that change their input least, in one shot"
    source: ClassVar[str] = "Men et al. 2024, arXiv 2403.03853, eq. 1"

    def observe(self, survey: BlockSurvey) -> dict[str, float]:
        return {"influence": survey.influence}

    def decide(self, notes: list[Any], anatomy: Anatomy) -> dict[str, Any]:
        """Return the removed blocks and the influence of every block."""
        influence = [note["influence"] for note in notes]
        candidates = self.candidates(len(influence), anatomy.family)
        # Of equals the later block goes: its error has fewer blocks left to grow in.
        order = sorted(candidates, key=lambda i: (influence[i], -i))
        return {"removed": sorted(order[: self.count(len(influence))]), "influence": influence}
