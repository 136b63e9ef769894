"""Which columns of a row a labelled example is in, and what they have to hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compress.data.examples_spec import ExamplesSpec, Words
from compress.data.glue import GLUE
from compress.data.pictures import COLUMNS
from compress.errors import CompressError, did_you_mean

# Pairs before single texts: the second text of a pair may have the name of a single one.
_PAIRS = tuple(
    dict.fromkeys(
        (("text", "text_pair"), *(n for t in GLUE.values() for n in t.columns if len(n) == 2))
    )
)
_TEXTS = (*_PAIRS, ("text",), ("sentence",), ("tokens",), ("words",))
_LABELS = ("label", "labels", "ner_tags", "pos_tags", "tags")


def text_columns(spec: ExamplesSpec, row: dict[str, Any]) -> tuple[str, str | None]:
    """The columns of the text and of the second text."""
    if spec.text is not None or spec.text_pair is not None:
        first = spec.text or _first_of(spec.text_pair, row)
        for name in filter(None, (first, spec.text_pair)):
            _require(row, name, "text" if name == first else "text_pair")
        return first, spec.text_pair
    candidates = spec.task.columns if spec.task else _TEXTS
    for names in candidates:
        if all(name in row for name in names):
            return names[0], names[1] if len(names) > 1 else None
    _require(row, candidates[-1][0], "text")
    raise AssertionError  # the column is missing, which _require has told


def _first_of(second: str | None, row: dict[str, Any]) -> str:
    """The column of the text, where only that of the second one is named."""
    known = [names[0] for names in _PAIRS if names[1] == second]
    known += [name for name in ("text", "sentence") if name != second]
    return next((name for name in known if name in row), "text")


def image_column(spec: ExamplesSpec, row: dict[str, Any]) -> str | None:
    """The column of the images; None of texts."""
    if spec.image is not None:
        _require(row, spec.image, "image")
        return spec.image
    if spec.text is not None or spec.task is not None:
        return None
    if any(all(name in row for name in names) for names in _TEXTS):
        return None
    return next((name for name in COLUMNS if name in row), None)


def image_of(row: dict[str, Any], name: str, number: int) -> Any:
    if row.get(name) is None:
        raise CompressError(
            f"an image in the column {name!r} of each example", f"none in row {number + 1}",
            "Name another column, or remove the row",
        )  # fmt: skip
    return row[name]


def beside(row: dict[str, Any], table: Path, column: str | None) -> dict[str, Any]:
    """A row whose images are files: their paths are seen from the table.

    Args:
        column: of the images, where it is not a usual one.
    """
    names = COLUMNS if column is None else (column,)
    found = {n: str(table.parent / row[n]) for n in names if isinstance(row.get(n), str)}
    return {**row, **found} if found else row


def label_column(spec: ExamplesSpec, row: dict[str, Any]) -> str:
    known = (spec.label,) if spec.label else spec.task.label if spec.task else _LABELS
    found = next((name for name in known if name in row), None)
    if found is None:
        _require(row, known[0], "label")
    return found


def _require(row: dict[str, Any], name: str, option: str) -> None:
    if name not in row:
        known = [key for key in row if isinstance(key, str)]
        raise CompressError(
            f"the column {name!r} in each example", f"columns {', '.join(known) or 'none'}",
            f"Set {option} to the column's name. {did_you_mean(name, known)}",
        )  # fmt: skip


def words_of(
    row: dict[str, Any], first: str, label: str, number: int
) -> tuple[Words, tuple[str | float, ...]]:
    """The words of a text and their labels."""
    words, labels = row.get(first), row.get(label)
    listed = all(isinstance(value, (list, tuple)) for value in (words, labels))
    if not listed or len(words) != len(labels) or not words:
        raise CompressError(
            f"words in the column {first!r} and as many labels in {label!r}",
            f"{words!r:.40} and {labels!r:.40} in row {number + 1}",
            "Mend the row, or name other columns (text, label)",
        )  # fmt: skip
    told = {"word": words, "label": labels}
    pairs = [{name: value[i] for name, value in told.items()} for i in range(len(words))]
    return (
        tuple(text_of(pair, "word", number) for pair in pairs),
        tuple(label_of(pair, "label", number) for pair in pairs),
    )


def text_of(row: dict[str, Any], name: str, number: int) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise CompressError(
            f"a text in the column {name!r} of each example", f"{value!r:.60} in row {number + 1}",
            "Name another column, or remove the row",
        )  # fmt: skip
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def label_of(row: dict[str, Any], name: str, number: int) -> str | float:
    value = row.get(name)
    if isinstance(value, bool):
        value = int(value)
    if isinstance(value, str):
        value = value.strip()
    if value is None or value == "" or not isinstance(value, (str, int, float)):
        raise CompressError(
            f"a label in the column {name!r} of each example", f"{value!r:.60} in row {number + 1}",
            "Remove examples without a label",
        )  # fmt: skip
    return value
