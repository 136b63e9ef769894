"""Options of the sampler. Every published variant is a choice of these, not another routine."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from compress.errors import CompressError
from compress.generators.description import MaskedGeneration
from compress.generators.schedules import EVEN, check_schedule

Order = Literal[
    "confidence", "low_confidence", "margin", "entropy", "random", "halton", "left_to_right",
    "ancestral",
]  # fmt: skip


class SamplerOptions(BaseModel):
    """How masks are filled.

    MaskGIT: the defaults. MDLM: order ancestral. LLaDA: order low_confidence, temperature 0, block
    32. Dream: order entropy, temperature 0.2, top_p 0.95.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(8, ge=1, description="network evaluations a sample (twice with guidance)")
    order: Order = Field(
        "confidence",
        description="which masks are filled first: those of the likeliest tokens (confidence with "
        "Gumbel noise, low_confidence without), of the largest margin between the first two, of "
        "the least entropy, at random, along a Halton sequence, left to right; or ancestral, each "
        "mask on its own as the diffusion's reverse process has it",
    )
    schedule: str | None = Field(
        None,
        description="how many stay masked: cosine, linear, log, exp, pow:P, even; by default even "
        "for low_confidence, linear for ancestral, else the model's",
    )
    temperature: float = Field(1.0, ge=0, description="of tokens; 0 takes the likeliest")
    temperature_final: float | None = Field(
        None, ge=0, description="at the last step; in between it changes linearly"
    )
    top_k: int | None = Field(None, ge=1, description="draw from the k likeliest tokens")
    top_p: float | None = Field(
        None, gt=0, le=1, description="draw from the fewest tokens of this much probability"
    )
    order_temperature: float = Field(
        4.5, ge=0, description="confidence: of the Gumbel noise; falls linearly to 0"
    )
    guidance: float = Field(
        0.0, ge=0, description="classifier-free guidance w in l + w (l - l_unconditional)"
    )
    guidance_schedule: Literal["constant", "linear"] = Field(
        "constant", description="linear: from near 0 at the first step to w at the last"
    )
    block: int | None = Field(
        None, ge=1, description="fill blocks of so many tokens one after the other"
    )
    threshold: float | None = Field(
        None, gt=0, lt=1, description="fill all masks whose token is at least so probable as well; "
        "fewer steps are taken",
    )  # fmt: skip
    cache: bool = Field(
        True,
        description="ancestral: no evaluation of a sample that did not change; same result",
    )

    @field_validator("schedule")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        try:
            return value if value is None else check_schedule(value, even=True)
        except CompressError as error:  # pydantic reports what is a ValueError
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _fit_together(self) -> SamplerOptions:
        if self.order == "ancestral":
            for name in ("block", "threshold"):
                if getattr(self, name) is not None:
                    raise ValueError(f"no {name} with order ancestral, which counts no tokens")
            if self.schedule == EVEN:
                raise ValueError("a schedule other than even with order ancestral")
        return self

    def schedule_of(self, spec: MaskedGeneration) -> str:
        """The schedule for a model."""
        usual = {"low_confidence": EVEN, "ancestral": "linear"}
        return self.schedule or usual.get(self.order, spec.schedule)

    def temperature_at(self, step: int) -> float:
        """Of tokens at ``step``, from 0."""
        if self.temperature_final is None or self.steps == 1:
            return self.temperature
        share = min(step, self.steps - 1) / (self.steps - 1)
        return self.temperature + share * (self.temperature_final - self.temperature)

    def order_temperature_at(self, step: int) -> float:
        """Of the confidence: tau (1 - r) with r the share of steps done after this one."""
        return self.order_temperature * (1 - (step + 1) / self.steps)

    def guidance_at(self, step: int) -> float:
        share = 1.0 if self.guidance_schedule == "constant" else (step + 1) / self.steps
        return self.guidance * share
