"""Labelled texts, pairs of texts, texts with a label for each word, and images: from a hub, a data
root, or files of one's own."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from compress.data.catalog import Local, canonical, find, splits
from compress.data.columns import (
    beside,
    image_column,
    image_of,
    label_column,
    label_of,
    text_columns,
    text_of,
    words_of,
)
from compress.data.glue import DATASET, GLUE, GlueTask
from compress.data.images import DIGITS
from compress.data.pictures import (
    class_names,
    image_place,
    image_rows_of,
    images_bytes,
    images_digest,
)
from compress.data.readers import expand, is_file_source, read_rows
from compress.data.text import PART, take_part
from compress.errors import CompressError
from compress.system.intake import at_home

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
    part: str = Field("all", description="all, head:F or tail:F, a fraction F of the examples")
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

    @field_validator("part")
    @classmethod
    def _known_part(cls, value: str) -> str:
        if not PART.fullmatch(value):
            raise ValueError(f"expected all, head:F or tail:F with F in (0, 1], got {value!r}")
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


@dataclass(frozen=True)
class Examples:
    """Labelled texts or images.

    Attributes:
        texts: in the order of the source; where words have labels, the words of each. None of
            images.
        pairs: the second text of each; None where there are no pairs.
        labels: as the source has them, strings or numbers; where words have labels, those of each
            text.
        names: of the labels by number, where the source or the recipe tells.
        description: one line for a report.
        images: as the source has them (:func:`compress.data.pictures.picture` makes arrays of
            them); none of texts.
    """

    texts: tuple[str, ...] | tuple[Words, ...]
    pairs: tuple[str, ...] | None
    labels: tuple[str | float, ...] | tuple[tuple[str | float, ...], ...]
    names: tuple[str, ...]
    description: str
    images: tuple[Any, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def by_word(self) -> bool:
        """Whether each word has a label."""
        return not self.images and not isinstance(self.texts[0], str)

    @property
    def flat_labels(self) -> tuple[str | float, ...]:
        """Every label, of texts or of words."""
        return sum(self.labels, ()) if self.by_word else self.labels

    @cached_property
    def digest(self) -> str:
        """sha256 of texts or images, and labels."""
        told = [self.texts, self.pairs, self.labels, self.names]
        told = json.dumps([*told, images_digest(self.images)] if self.images else told)
        return hashlib.sha256(told.encode()).hexdigest()

    @cached_property
    def bytes(self) -> int:
        """Of the texts in UTF-8, or of the images as they are held."""
        if self.images:
            return images_bytes(self.images)
        texts = map(" ".join, self.texts) if self.by_word else self.texts
        return sum(len(text.encode()) for text in (*texts, *(self.pairs or ())))


def load_examples(spec: ExamplesSpec, data_root: str | Path | None = None) -> Examples:
    """Read labelled texts or images.

    Args:
        data_root: a folder with local copies of hub data sets, asked before any network is used.

    Raises:
        CompressError: a source that does not exist or does not parse, no such column, texts that
            are no text, examples without a label, or none at all.
    """
    rows, about = _read(spec, data_root)
    place = None if spec.source == DIGITS else image_place(spec.source, spec.split, data_root)
    return examples_of(rows, spec, about, class_names(place))


def examples_of(
    rows: list[dict[str, Any]], spec: ExamplesSpec, about: str, names: tuple[str, ...] = ()
) -> Examples:
    """Labelled texts or images from rows, as the spec describes them.

    Args:
        about: a line on where the rows are from.
        names: of the labels by number, where the place of the rows tells them.

    Raises:
        CompressError: as :func:`load_examples`.
    """
    rows = take_part(rows[: spec.limit], spec.part) if len(rows) > 1 else rows
    if not rows:
        raise CompressError(
            f"labelled examples from {spec.source}",
            "none" if spec.part == "all" else f"nothing in part {spec.part}",
            "Choose another source, split or part",
        )
    label = label_column(spec, rows[0])
    part = "" if spec.part == "all" else f", part {spec.part}"
    if (image := image_column(spec, rows[0])) is not None:
        return Examples(
            (), None, tuple(label_of(row, label, n) for n, row in enumerate(rows)),
            spec.names or names, f"{len(rows):,} images of {about}{part}",
            tuple(image_of(row, image, n) for n, row in enumerate(rows)),
        )  # fmt: skip
    first, second = text_columns(spec, rows[0])
    pairs = None if second is None else tuple(text_of(row, second, n) for n, row in enumerate(rows))
    if isinstance(rows[0].get(first), (list, tuple)):
        both = [words_of(row, first, label, n) for n, row in enumerate(rows)]
        return Examples(
            tuple(words for words, _ in both), None, tuple(labels for _, labels in both),
            spec.names, f"{len(rows):,} texts of {about}, a label a word{part}",
        )  # fmt: skip
    return Examples(
        tuple(text_of(row, first, n) for n, row in enumerate(rows)),
        pairs,
        tuple(label_of(row, label, n) for n, row in enumerate(rows)),
        spec.names,
        f"{len(rows):,} examples of {about}{part}",
    )


def _read(spec: ExamplesSpec, data_root: str | Path | None) -> tuple[list[dict[str, Any]], str]:
    """The rows and a line about them."""
    place = None if spec.source == DIGITS else image_place(spec.source, spec.split, data_root)
    if spec.source == DIGITS or place is not None:
        rows = image_rows_of(spec.split, place, spec.image, spec.label, spec.limit)
        return rows, f"{spec.source} {spec.split}"
    if is_file_source(spec.source):
        paths = expand(spec.source, spec.split)
        rows = [
            beside(row, path, spec.image)
            for path in paths
            for row in read_rows(path, Local(str(path)))
        ]
        return rows, spec.source + (f" ({len(paths)} files)" if len(paths) > 1 else "")
    dataset, subset = canonical(spec.source, spec.subset)
    name = f"{dataset} {subset} {spec.split}".replace("  ", " ")
    have: list[str] = []
    if data_root is not None:
        root = at_home(data_root)
        found = find(root, spec.source, spec.subset, spec.split)
        if found is not None:
            path, local = found
            note = f" ({local.note})" if local.note else ""
            return read_rows(path, local), f"{name} from {path.name}{note}"
        have = splits(root, dataset)
    from compress.data.hub import read_hub_rows

    return read_hub_rows(
        dataset, subset or None, spec.split, limit=spec.limit, data_root=data_root, have=have
    ), name  # fmt: skip
