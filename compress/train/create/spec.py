"""The section ``model.train`` of a recipe. Parsing only; nothing is loaded or trained here."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from compress.data.examples_spec import ExamplesSpec
from compress.data.images import ImageSpec
from compress.data.text import TextSpec
from compress.train import TrainingOptions

_FROZEN = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

BYTES = 256
SPECIAL = ("<pad>", "<eos>", "<mask>")  # the last ids of a tokenizer that a recipe makes


class TokenizerSpec(BaseModel):
    """A tokenizer of our own, trained on the training text."""

    model_config = _FROZEN

    kind: Literal["bytes", "bpe"] = Field(
        "bytes", description="a token a byte, or byte-level byte pair encoding"
    )
    size: int = Field(
        BYTES + len(SPECIAL),
        le=2**20,
        description="of the vocabulary, the 256 bytes and 3 special tokens included",
    )

    @model_validator(mode="after")
    def _has_room(self) -> TokenizerSpec:
        smallest = BYTES + len(SPECIAL)
        if self.kind == "bytes" and self.size != smallest:
            raise ValueError(f"no size with bytes: it is {smallest}")
        if self.kind == "bpe" and self.size <= smallest:
            raise ValueError(f"a size above {smallest}, the bytes and special tokens")
        return self


class ImageTokens(ImageSpec):
    """Images, and the codebook that makes them tokens."""

    patch: int | tuple[int, int] = Field(2, description="pixels a token: a side, or height, width")
    codes: int = Field(64, ge=2, description="size of the k-means codebook")
    classes: int = Field(10, ge=1, description="of the data set")

    @property
    def sides(self) -> tuple[int, int]:
        """The patch as (height, width)."""
        return (self.patch, self.patch) if isinstance(self.patch, int) else self.patch


class Objective(BaseModel):
    """What the model learns to predict."""

    model_config = _FROZEN

    kind: Literal["causal", "masked", "labels"] = Field(
        "causal",
        description="the next token, masked tokens at all mask ratios, or the labels of examples "
        "(what it is where there are examples)",
    )
    weighting: Literal["maskgit", "mdlm", "llada"] = Field(
        "mdlm", description="masked: mean over the masked tokens, or likelihood bound (1/t)"
    )
    ratios: str | None = Field(
        None,
        description="masked: law of the mask ratios (compress.generators.mask_ratios); by default "
        "uniform for bounds, cosine for maskgit",
    )
    schedule: str | None = Field(
        None,
        description="masked: by default used to sample; linear for bounds, cosine for maskgit",
    )
    shift: bool = Field(
        False, description="masked: position i predicts token i + 1, for an adapted causal model"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="masked")
    drop_condition: float = Field(
        0.1, ge=0, le=1, description="masked images: share of rows trained without their class, "
        "for classifier-free guidance",
    )  # fmt: skip


class TrainSpec(BaseModel):
    """A model that the run trains before anything else."""

    model_config = ConfigDict(**_FROZEN, populate_by_name=True)

    architecture: dict[str, Any] | None = Field(
        None, description="model_type and the fields of its config, for a model from scratch"
    )
    from_: str | None = Field(
        None, alias="from", description="a source, as in model.source, whose model is adapted"
    )
    tokenizer: TokenizerSpec | None = Field(None, description="of a model from scratch on text")
    objective: Objective = Field(Objective(), description="what the model learns to do")
    text: TextSpec | None = Field(None, description="what it learns from: text")
    images: ImageTokens | None = Field(None, description="what it learns from: images")
    examples: ExamplesSpec | None = Field(
        None,
        description="labelled texts or images: the model is fine-tuned with a head for their "
        "labels",
    )
    length: int | None = Field(
        None,
        ge=2,
        description="tokens a sequence of text, special ones included; where a checkpoint learns "
        "labels 128 by default, or what it has positions for; images have as many as patches",
    )
    packing: Literal["stream", "documents"] = Field(
        "stream",
        description="text: windows of one stream, or a document a row, padded",
    )
    special_tokens: bool = Field(
        True,
        description="text: put around each sequence what the tokenizer adds by itself (of causal "
        "models' windows only what it adds in front); false: nothing",
    )
    training: TrainingOptions = Field(description="steps, batch, learning rate ...")

    @field_validator("tokenizer", "objective", mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _labels_of_examples(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("examples") is not None:
            return {"objective": "labels", **value}
        return value

    @field_validator("architecture")
    @classmethod
    def _named(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is None:
            return None
        if not isinstance(value.get("model_type"), str):
            raise ValueError("a mapping with model_type, such as {model_type: llama, ...}")
        return {key: value[key] for key in sorted(value)}  # the file's order means nothing

    @model_validator(mode="after")
    def _whole(self) -> TrainSpec:
        if (self.architecture is None) == (self.from_ is None):
            raise ValueError("either architecture (from scratch) or from (a model to adapt)")
        data = [x for x in (self.text, self.images, self.examples) if x is not None]
        if len(data) != 1:
            raise ValueError("one of text, images and examples to train on")
        tuned = self.examples is not None and self.from_ is not None
        if self.images is None and self.length is None and not tuned:
            raise ValueError("length, the tokens a sequence of text")
        if (self.examples is not None) != (self.objective.kind == "labels"):
            raise ValueError("objective labels with examples, and in no other case")
        if self.images is not None:
            self._check_images()
        if (self.tokenizer is not None) != (self.images is None and self.from_ is None):
            raise ValueError("tokenizer (bytes, or {kind: bpe, size: N}) with architecture and text"
                             " or examples, and in no other case")  # fmt: skip
        return self

    def _check_images(self) -> None:
        if self.length is not None or self.packing != "stream":
            raise ValueError("no length or packing with images: the patch gives the length")
        if self.objective.kind != "masked":
            raise ValueError("objective masked with images")
        if self.from_ is not None:
            raise ValueError("architecture with images: the codebook gives the vocabulary")

    @property
    def vocabulary(self) -> int | None:
        """Ids of a model from scratch, the special ones included; None for an adapted one."""
        if self.images is not None:  # codes, classes, no class, mask
            return self.images.codes + self.images.classes + 2
        return self.tokenizer.size if self.tokenizer is not None else None
