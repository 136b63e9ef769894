"""Measured figures as rows of a JSON file, so that documents and reviews read one source."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from compress.errors import CompressError

RESULTS = Path(__file__).resolve().parents[1] / "results"


class Row(BaseModel):
    """One figure, what it has to reach, and how anyone gets it again."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    figure: str = Field(min_length=1, description="what was measured; unique in a file")
    value: float
    unit: str = Field(description="of value, bar and peer; empty for ratios and counts")
    op: Literal["<=", ">="] = Field(description="the side of the bar that is good")
    bar: float | None = Field(description="what the figure must reach; None for information")
    peer: float | None = Field(description="the same figure of the other tool, in the same run")
    command: str = Field(min_length=1, description="what to type to measure it")

    @property
    def met(self) -> bool | None:
        """Whether the bar is reached; None where there is none."""
        if self.bar is None:
            return None
        return self.value <= self.bar if self.op == "<=" else self.value >= self.bar


_ROWS = TypeAdapter(list[Row])


def read_rows(path: str | Path) -> list[Row]:
    """Read a file of rows; a file that does not exist has none.

    Raises:
        CompressError: the file is not a JSON list of rows, or names a figure twice.
    """
    path = Path(path)
    if not path.exists():
        return []
    try:
        rows = _ROWS.validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise CompressError(
            "a JSON list of rows as compress.eval.bench.rows.Row describes them", str(error),
            "Restore the file or give another one with --results", where=str(path),
        ) from None  # fmt: skip
    names = [row.figure for row in rows]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise CompressError(
            "each figure once", f"{twice[0]!r} more than once", "Remove one", where=str(path)
        )
    return rows


def write_rows(path: str | Path, rows: Iterable[Row]) -> list[Row]:
    """Merge ``rows`` into a file: those of the same figure are replaced, the others stay.

    The file is sorted by figure and replaced in one go, so a crash leaves the old one.

    Returns:
        All rows of the file.

    Raises:
        CompressError: the file that is there does not hold rows.
    """
    path = Path(path)
    merged = {row.figure: row for row in read_rows(path)} | {row.figure: row for row in rows}
    ordered = [merged[name] for name in sorted(merged)]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # One row a line: a new measurement is a short difference in a review.
        lines = ",\n".join(json.dumps(row.model_dump(), ensure_ascii=False) for row in ordered)
        temporary.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return ordered


def number(value: float) -> str:
    """A figure with four significant digits, without an exponent where a reader can do without."""
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    size = abs(value)
    if size < 1e-3 or size >= 1e6:
        return f"{value:.2e}"
    return f"{value:.{max(0, 3 - math.floor(math.log10(size)))}f}"


def print_rows(rows: Iterable[Row]) -> None:
    """Print rows as a table on the terminal."""
    from compress.tables import print_table

    print_table(
        "measured",
        ["figure", "value", "peer", "bar", "met"],
        [
            [
                row.figure, f"{number(row.value)} {row.unit}".strip(),
                "" if row.peer is None else number(row.peer),
                "" if row.bar is None else f"{row.op} {number(row.bar)}",
                {None: "", True: "yes", False: "NO"}[row.met],
            ]
            for row in rows
        ],
        right=(1, 2, 3),
    )  # fmt: skip
