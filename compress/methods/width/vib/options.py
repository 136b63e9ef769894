"""The options of a step, checked; and which gates they ask for."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from compress.methods.base import HEADS, HIDDEN, MODULES, NEURONS, VALUES, WIDTH, Method
from compress.methods.width.vib.gates import ATTENTION, FFN
from compress.methods.width.vib.learning import Schedule
from compress.methods.width.vib.sizes import Counted
from compress.train.language import DistillationOptions
from compress.train.options import TrainingOptions

LAYERS = "layers"
Unit = Literal["hidden", "heads", "neurons", "layers"]
UNITS: tuple[Unit, ...] = ("hidden", "heads", "neurons", "layers")
_FAST = 0.03  # of the data, as the abstract says
_CLIMB = 30.0  # of a multiplier under Adam, which takes steps of about its rate


class Multiples(BaseModel):
    """Hardware steps: widths become multiples of these, where they do not stay as they are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hidden: int = Field(1, ge=1, description="channels of the residual stream")
    heads: int = Field(1, ge=1, description="key/value heads of a block")
    neurons: int = Field(1, ge=1, description="neurons of an FFN")


def _training(given: dict[str, Any]) -> TrainingOptions | None:
    """Gates that learn alone choose worse than their start does (docs/vib.md); beside weights they
    take what a fine-tuning takes."""
    if given.get("mode", "faster") == "faster":
        return None
    return TrainingOptions(
        steps=1000 if given["mode"] == "full" else 300, batch=32, learning_rate=0.05,
        schedule="linear", final_ratio=0.1, clip=None,
    )  # fmt: skip


def _tuning(given: dict[str, Any]) -> TrainingOptions | None:
    if given.get("mode", "faster") == "faster":
        return TrainingOptions(
            steps=120, batch=1, learning_rate=0.005, final_ratio=0.1, clip=None,
            checkpoint_every=20,
        )  # fmt: skip
    return None


def _fine_tune(given: dict[str, Any]) -> TrainingOptions | None:
    if given.get("mode", "faster") == "faster":
        return None
    return TrainingOptions(
        steps=1000 if given["mode"] == "full" else 300, batch=32, learning_rate=2e-5, warmup=20
    )


class VIBOptions(Method):
    """Everything that a recipe may say of a ``vib`` step."""

    share: float | None = Field(
        None, ge=0, lt=1, description="Share of the size to remove. Give this or `size`."
    )
    size: int | None = Field(
        None, gt=0, description="What may be left: parameters, MACs a token or bytes, see `of`."
    )
    of: Counted = Field(
        "blocks",
        description="What is counted: parameters of the `blocks` or of the whole `model`, `macs` "
        "of linears and head for a token, or `bytes` of all parameters as they are stored.",
    )
    units: tuple[Unit, ...] = Field(
        UNITS,
        description="What may go: channels of the residual stream (`hidden`), key/value heads with "
        "their queries, FFN neurons, whole attention and FFN sub-layers (`layers`).",
    )
    mode: Literal["full", "fast", "faster"] = Field(
        "faster",
        description="`full`: weights and gates learn from all data (VTrans); `fast`: from a share "
        "of it; `faster`: no weight learns.",
    )
    data_share: float | None = Field(
        None, gt=0, le=1,
        description="Share of the calibration batches that is learned from; 0.03 in mode fast, "
        "else 1.",
    )  # fmt: skip
    start: Literal["importance", "fresh"] = Field(
        "importance",
        description="Where gates begin: at the optimum that the curvature of the loss predicts "
        "(docs/vib.md), or all alike (mu 1, log sigma^2 -9).",
    )
    start_batches: int = Field(
        32, ge=1, description="Calibration batches, at most, on which that curvature is measured."
    )
    trust: float = Field(
        0.25, ge=0, le=1,
        description="With start: importance, how far gates begin apart: 1 as the curvature says, 0 "
        "all alike. What the gates are to change their minds about must be within their reach.",
    )  # fmt: skip
    margin: float = Field(
        1.0, ge=0,
        description="With start: importance, how far below the threshold, in log alpha, the units "
        "begin that would be the last ones to go.",
    )  # fmt: skip
    training: TrainingOptions | None = Field(
        default_factory=_training,
        description="Of the gates; its rate is that of log sigma^2. In the modes full and fast "
        "weights learn with them. null, the default in mode faster: decide from the start alone.",
    )
    mean_rate: float = Field(0.1, ge=0, description="Rate of mu, as a share of training's.")
    weight_rate: float = Field(2e-5, gt=0, description="Rate of weights beside gates.")
    multiplier_rate: float | None = Field(
        None, gt=0,
        description="Rate of the constraint's multipliers. By default 30 / steps, with which they "
        "climb as far in few steps as in many.",
    )  # fmt: skip
    divergence: float = Field(
        0.01, ge=0,
        description="Price of a nat of the gates' KL divergence, averaged over the weights they "
        "stand for.",
    )  # fmt: skip
    warmup: float = Field(
        0.3, ge=0, le=1, description="Share of the steps in which the size falls to the target."
    )
    sharpness: tuple[float, float] = Field(
        (2.0, 10.0),
        description="Slope of the expected size at the threshold, at the start and the end. A "
        "steep one counts exactly and moves nothing far from there: short trainings want it low.",
    )
    tuning: TrainingOptions | None = Field(
        default_factory=_tuning,
        description="Once it is decided what goes: mu of what stays learns on, everything else "
        "gone. By default 120 steps in mode faster, else none.",
    )
    correction: bool = Field(
        True,
        description="Before that: fit the linears of the blocks by least squares to what they "
        "returned with all gates open, each on the inputs that it has now.",
    )
    correction_batches: int = Field(
        32, ge=1, description="Calibration batches, at most, that these fits are on."
    )
    damping: float = Field(
        0.01, gt=0, description="Ridge of these fits, as a share of the mean input energy."
    )
    fine_tune: TrainingOptions | None = Field(
        default_factory=_fine_tune,
        description="After that: the weights of the narrow model learn. None by default in mode "
        "faster.",
    )
    distillation: DistillationOptions | None = Field(
        DistillationOptions(labels=1.0, logits=1.0),
        description="Learn from the uncompressed model as well: its predictions (logits) and "
        "hidden states, channel by channel. null: from the text alone.",
    )
    multiple: Multiples = Field(
        Multiples(), description="Hardware steps, such as {neurons: 64, hidden: 16}."
    )
    uniform: bool = Field(
        False,
        description="One number of heads and one of neurons for all blocks, for a stock config; "
        "`layers` must then not be among the units.",
    )

    @model_validator(mode="after")
    def _consistent(self):
        if (self.share is None) == (self.size is None):
            raise ValueError("give either share, what is to go, or size, what may be left")
        if not self.units or len(set(self.units)) < len(self.units):
            raise ValueError(f"units: one or more of {', '.join(UNITS)}, each once")
        if self.uniform and LAYERS in self.units:
            raise ValueError("uniform blocks have all their sub-layers: leave layers out of units")
        if self.training is None and self.start == "fresh":
            raise ValueError("training: null needs start: importance, or chance would decide")
        if min(self.sharpness) <= 0:
            raise ValueError("sharpness: two positive numbers, at the start and at the end")
        return self

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.divergence, self.warmup, self.sharpness)

    @property
    def climb(self) -> float:
        """Rate of the multipliers."""
        return self.multiplier_rate or _CLIMB / self.training.steps

    @property
    def kinds(self) -> tuple[str, ...]:
        """The gates that the units ask for."""
        found = [kind for kind in (HIDDEN, HEADS, NEURONS) if kind in self.units]
        return (*found, ATTENTION, FFN) if LAYERS in self.units else tuple(found)

    @property
    def multiples(self) -> dict[str, int]:
        return self.multiple.model_dump()

    @property
    def trains_weights(self) -> bool:
        """Whether weights learn beside gates."""
        return self.mode != "faster" and self.training is not None

    @property
    def changes_weights(self) -> bool:
        """Whether weights are others once it is decided what goes."""
        return self.trains_weights or self.correction

    @property
    def remembers(self) -> bool:
        """Whether the means learn from the model as it was before its weights were corrected."""
        taught = self.tuning is not None and self.distillation is not None
        return self.correction and taught and not self.trains_weights

    @property
    def narrows_outer(self) -> bool:
        """Whether what lies outside the blocks is another once units are taken out."""
        return HIDDEN in self.units or self.trains_weights

    @property
    def gated(self) -> tuple[TrainingOptions, ...]:
        """The trainings of the model with gates in it."""
        return tuple(o for o in (self.training, self.tuning) if o is not None)

    @property
    def tuned_from(self) -> DistillationOptions | None:
        """What the fine-tuning learns from: hidden states have lost channels by then."""
        if self.distillation is None or HIDDEN not in self.units:
            return self.distillation
        return self.distillation.model_copy(update={"hidden": 0.0})

    @property
    def data(self) -> float:
        """Share of the data that is learned from."""
        if self.data_share is not None:
            return self.data_share
        return _FAST if self.mode == "fast" else 1.0

    def makes(self) -> frozenset[str]:
        made = {VALUES}
        made |= {WIDTH} if self.narrowing() else set()
        made |= {MODULES} if LAYERS in self.units else set()
        return frozenset(made)

    def narrowing(self) -> frozenset[str]:
        return frozenset({HIDDEN, HEADS, NEURONS} & set(self.units))
