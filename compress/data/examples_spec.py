"""Which labelled texts or images are meant: the part of a recipe that says so."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from compress.data.catalog import canonical
from compress.data.glue import DATASET, GLUE, GlueTask
from compress.data.text import Part

Words = tuple[str, ...]  # a text that comes as words, each with a label


class ExamplesSpec(BaseModel):
    """Which labelled texts or images, and in which columns they are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(
        description="a task of GLUE by its name (sst2), a hub data set (owner/name), or a file or "
        "pattern with rows (.jsonl .json .parquet .csv .tsv, also .gz), or a folder that "
        "datasets' save_to_disk wrote; of images also a folder with a folder for each class, an "
        ".npz file, a folder of IDX files, or digits (of scikit-learn)"
    )
    subset: str | None = Field(None, description="configuration of a hub data set")
    split: str = Field("train", description="split of a hub data set")
    text: str | None = Field(
        None,
        description="column with the texts, or with lists of words that have a label each; by "
        "default what the task has, text, sentence, tokens or words",
    )
    text_pair: str | None = Field(
        None, description="column with the second text of each pair, where there are pairs"
    )
    image: str | None = Field(
        None,
        description="column with the images, for a model that reads images; by default image, img "
        "or images",
    )
    label: str | None = Field(
        None,
        description="column with the labels; by default label, and of words labels, ner_tags, "
        "pos_tags or tags",
    )
    labels: tuple[str, ...] | Literal["number"] | None = Field(
        None,
        description="names of the labels in the order of their numbers, or number, where a number "
        "is to be predicted; by default what the task has, or what the training data show",
    )
    part: Part = Field("all", description="all, head:F or tail:F, a fraction F of the examples")
    limit: int | None = Field(None, gt=0, description="read at most so many examples")

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        """A task of GLUE by its name alone."""
        if isinstance(value, str):
            value = {"source": value}
        if isinstance(value, dict) and value.get("source") in GLUE and not value.get("subset"):
            return {**value, "source": DATASET, "subset": value["source"]}
        return value

    @field_validator("labels")
    @classmethod
    def _several(cls, value: Any) -> Any:
        if isinstance(value, tuple) and (len(value) < 2 or len(set(value)) < len(value)):
            raise ValueError("at least two names, each once")
        return value

    @property
    def task(self) -> GlueTask | None:
        """The task of GLUE that is read, if it is one."""
        dataset, subset = canonical(self.source, self.subset)
        return GLUE.get(subset) if dataset == DATASET else None

    @property
    def regression(self) -> bool | None:
        """Whether numbers are to be predicted; None where that is not known beforehand."""
        if self.labels is not None:
            return self.labels == "number"
        return None if self.task is None else not self.task.names

    @property
    def names(self) -> tuple[str, ...]:
        """The labels' names by number, where they are known beforehand."""
        if isinstance(self.labels, tuple):
            return self.labels
        return self.task.names if self.task is not None and self.labels is None else ()


def evaluation_examples(value: Any) -> ExamplesSpec:
    """The examples of an evaluation: by default those that a task's figures are reported on."""
    spec = ExamplesSpec.model_validate(value)
    if "split" in spec.model_fields_set:
        return spec
    split = spec.task.validation if spec.task else "validation"
    return spec.model_copy(update={"split": split})
