"""Labelled texts, pairs of texts, texts with a label for each word, and images: from a hub, a data
root, or files of one's own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

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
from compress.data.examples_spec import ExamplesSpec, Words
from compress.data.pictures import (
    class_names,
    image_place,
    image_rows_of,
    images_bytes,
    images_digest,
)
from compress.data.readers import expand, is_file_source, read_rows
from compress.data.storage import is_saved, saved_classes
from compress.data.text import take_part
from compress.errors import CompressError
from compress.system.intake import at_home

_NOTHING: Mapping[str, tuple[str, ...]] = MappingProxyType({})


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


class _Read(NamedTuple):
    """What :func:`examples_of` makes examples of."""

    rows: list[dict[str, Any]]
    spec: ExamplesSpec
    about: str
    classes: Mapping[str, tuple[str, ...]] = _NOTHING


def load_examples(spec: ExamplesSpec, data_root: str | Path | None = None) -> Examples:
    """Read labelled texts or images.

    Args:
        data_root: a folder with local copies of hub data sets, asked before any network is used.

    Raises:
        CompressError: a source that does not exist or does not parse, no such column, texts that
            are no text, examples without a label, or none at all.
    """
    return examples_of(*_read(spec, data_root))


def examples_of(
    rows: list[dict[str, Any]],
    spec: ExamplesSpec,
    about: str,
    classes: Mapping[str, tuple[str, ...]] = _NOTHING,
) -> Examples:
    """Labelled texts or images from rows, as the spec describes them.

    Args:
        about: a line on where the rows are from.
        classes: names of labels by number, for each column where the place of the rows tells them.

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
    names = () if spec.regression else spec.names or classes.get(label, ())
    part = "" if spec.part == "all" else f", part {spec.part}"
    if (image := image_column(spec, rows[0])) is not None:
        return Examples(
            (), None, tuple(label_of(row, label, n) for n, row in enumerate(rows)),
            names, f"{len(rows):,} images of {about}{part}",
            tuple(image_of(row, image, n) for n, row in enumerate(rows)),
        )  # fmt: skip
    first, second = text_columns(spec, rows[0])
    pairs = None if second is None else tuple(text_of(row, second, n) for n, row in enumerate(rows))
    if isinstance(rows[0].get(first), (list, tuple)):
        both = [words_of(row, first, label, n) for n, row in enumerate(rows)]
        return Examples(
            tuple(words for words, _ in both), None, tuple(labels for _, labels in both),
            names, f"{len(rows):,} texts of {about}, a label a word{part}",
        )  # fmt: skip
    return Examples(
        tuple(text_of(row, first, n) for n, row in enumerate(rows)),
        pairs,
        tuple(label_of(row, label, n) for n, row in enumerate(rows)),
        names,
        f"{len(rows):,} examples of {about}{part}",
    )


def _read(spec: ExamplesSpec, data_root: str | Path | None) -> _Read:
    place = image_place(spec.source, spec.split, data_root)
    if place is not None:
        rows = image_rows_of(place, spec.image, spec.label, spec.limit)
        classes = {"label": class_names(place)}
        # The arrays that the spec names are the columns image and label here.
        renamed = spec.model_copy(update={"image": None, "label": None})
        return _Read(rows, renamed, f"{spec.source} {place.split}".rstrip(), classes)
    if is_file_source(spec.source):
        paths = expand(spec.source, spec.split)
        rows = [
            beside(row, path, spec.image)
            for path in paths
            for row in read_rows(path, Local(str(path)))
        ]
        about = spec.source + (f" ({len(paths)} files)" if len(paths) > 1 else "")
        return _Read(rows, spec, about, saved_classes(paths[0]) if is_saved(paths[0]) else {})
    dataset, subset = canonical(spec.source, spec.subset)
    name = f"{dataset} {subset} {spec.split}".replace("  ", " ")
    have: list[str] = []
    if data_root is not None:
        root = at_home(data_root)
        found = find(root, spec.source, spec.subset, spec.split)
        if found is not None:
            path, local = found
            note = f" ({local.note})" if local.note else ""
            return _Read(read_rows(path, local), spec, f"{name} from {path.name}{note}")
        have = splits(root, dataset)
    from compress.data.hub import read_hub_rows

    rows = read_hub_rows(
        dataset, subset or None, spec.split, limit=spec.limit, data_root=data_root, have=have
    )
    return _Read(rows, spec, name)
