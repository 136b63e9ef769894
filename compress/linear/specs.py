"""How a module that replaces a linear is described in a checkpoint's config."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class LowRank(BaseModel):
    """A linear is a :class:`~compress.linear.modules.LowRankLinear` of this rank."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["low_rank"] = "low_rank"
    rank: int = Field(ge=1)


class Replaced(BaseModel):
    """A GPT-2 ``Conv1D`` is an ``nn.Linear``."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["linear"] = "linear"


ModuleSpec = Annotated[LowRank | Replaced, Field(discriminator="kind")]
