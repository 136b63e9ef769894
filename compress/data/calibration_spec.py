"""Which inputs a model sees while it is compressed: a recipe's section ``calibration``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from compress.data.examples_spec import ExamplesSpec
from compress.data.images import ImageSpec
from compress.data.text import TextSpec


class CalibrationSpec(BaseModel):
    """Which inputs the model sees while it is compressed."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    text: TextSpec | None = None
    images: ImageSpec | None = Field(
        None, description="instead of text, for models whose tokens are patches of images"
    )
    examples: ExamplesSpec | None = Field(
        None,
        description="instead of text, for models with a head of labels: labelled texts or pairs, a "
        "sample each, with special tokens, cut to the length and padded (padding counts for "
        "nothing); a task of GLUE by its name, or source, subset, split, text, text_pair, label",
    )
    samples: int = Field(128, gt=0, description="sequences")
    length: int = Field(512, gt=1, description="tokens a sequence, special ones included")
    packing: Literal["stream", "documents"] = Field(
        "stream",
        description="text: windows of one stream, or a document a sequence, cut to the length and "
        "padded (padding counts for nothing)",
    )
    special_tokens: bool = Field(
        True,
        description="put around each sequence what the tokenizer adds by itself (BOS in front for "
        "causal models, [CLS] and [SEP] for masked ones), or what a masked generator's description "
        "says",
    )
    selection: Literal["head", "random"] = Field(
        "head", description="sequences from the start of the text, or drawn with the seed"
    )
    batch: int = Field(
        1,
        gt=0,
        description="sequences at once; small batches stay in the processor's cache and memory",
    )
    mask_ratio: Annotated[float, Field(ge=0, le=1)] | Literal["stratified"] | None = Field(
        None,
        description="share of masked tokens, or stratified: shares spread evenly over (0, 1]; by "
        "default stratified for masked generators, 0.15 for other masked language models",
    )

    @model_validator(mode="after")
    def _one_kind(self) -> CalibrationSpec:
        if len([x for x in (self.text, self.images, self.examples) if x is not None]) != 1:
            raise ValueError("one of text, images and examples")
        return self

    @property
    def source(self) -> str:
        """Where the inputs come from."""
        return (self.text or self.images or self.examples).source
