"""Measured figures as rows of a JSON file, so that documents and reviews read one source."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from compress.errors import CompressError
from compress.eval.bench import provenance

DATA_ROOT = " --data-root DIR"  # what a command says where the data were local copies
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
    range: tuple[float, float] | None = Field(
        default=None, description="lowest and highest over the seeds; the value is their median"
    )
    seeds: int | None = Field(default=None, ge=2, description="how many seeds, of anything random")
    commit: str | None = Field(
        default=None, description="code that measured it; None where an older file does not say"
    )
    processor: str | None = Field(default=None, description="machine that measured it")

    @model_validator(mode="after")
    def _range_of_seeds(self) -> Row:
        if (self.range is None) != (self.seeds is None):
            raise ValueError("range and seeds: both or neither")
        if self.range is not None and not self.range[0] <= self.value <= self.range[1]:
            raise ValueError("a value within its range")
        return self

    @property
    def met(self) -> bool | None:
        """Whether the bar is reached; None where there is none."""
        if self.bar is None:
            return None
        return self.value <= self.bar if self.op == "<=" else self.value >= self.bar


def over_seeds(values: Iterable[float]) -> dict[str, Any]:
    """The fields ``value``, ``range`` and ``seeds`` of a row, from a figure of each seed.

    Raises:
        CompressError: fewer than two.
    """
    found = sorted(values)
    if len(found) < 2:
        raise CompressError("figures of at least two seeds", str(len(found)), where="row")
    return {"value": median(found), "range": (found[0], found[-1]), "seeds": len(found)}


def of_seeds(values: Sequence[float]) -> dict[str, Any]:
    """The fields of a row from the figure of each seed, of which there may be one."""
    return over_seeds(values) if len(values) > 1 else {"value": values[0]}


def stamped(rows: Iterable[Row]) -> list[Row]:
    """The rows with this code and this machine, where they do not say theirs.

    :func:`write_rows` does it; call it where rows are kept in another file in between.
    """
    now = {"commit": provenance.commit(), "processor": provenance.processor()}
    return [row.model_copy(update=now) if row.commit is None else row for row in rows]


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


def write_rows(path: str | Path, rows: Iterable[Row], *, whole: bool = False) -> list[Row]:
    """Merge ``rows``, :func:`stamped`, into a file: those of the same figure are replaced.

    The file is sorted by figure and replaced in one go, so a crash leaves the old one.

    Args:
        rows: what was measured.
        whole: they are all that their commands measure, so that a figure of the file which names
            one of these commands and is not among them is no longer measured: it is dropped.

    Returns:
        All rows of the file.

    Raises:
        CompressError: the file that is there does not hold rows.
    """
    path = Path(path)
    rows = stamped(rows)
    commands = {_plain(row.command) for row in rows} if whole else set()
    merged = {row.figure: row for row in read_rows(path) if _plain(row.command) not in commands}
    merged |= {row.figure: row for row in rows}
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


def _plain(command: str) -> str:
    """A command without where the data lie, which is no part of what it measures."""
    return command.replace(DATA_ROOT, "")


def number(value: float) -> str:
    """A figure with four significant digits, without an exponent where a reader can do without."""
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    size = abs(value)
    if size < 1e-3 or size >= 1e6:
        return f"{value:.2e}"
    return f"{value:.{max(0, 3 - math.floor(math.log10(size)))}f}"


def shown(row: Row) -> str:
    """A row's figure as documents show it: 52.63, or with seeds 52.63 (51.90-53.01)."""
    if row.range is None:
        return number(row.value)
    return f"{number(row.value)} ({number(row.range[0])}-{number(row.range[1])})"


def print_rows(rows: Iterable[Row]) -> None:
    """Print rows as a table on the terminal."""
    from compress.system.tables import print_table

    print_table(
        "measured",
        ["figure", "value", "peer", "bar", "met"],
        [
            [
                row.figure, f"{shown(row)} {row.unit}".strip(),
                "" if row.peer is None else number(row.peer),
                "" if row.bar is None else f"{row.op} {number(row.bar)}",
                {None: "", True: "yes", False: "NO"}[row.met],
            ]
            for row in rows
        ],
        right=(1, 2, 3),
    )  # fmt: skip
