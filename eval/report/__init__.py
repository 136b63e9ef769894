"""Reports: a typed result, and its forms as JSON, Markdown, HTML and a terminal table."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.eval.report.environment import environment
from compress.eval.report.findings import findings
from compress.eval.report.html import render_html
from compress.eval.report.markdown import render_markdown
from compress.eval.report.schema import (
    DataEntry,
    Environment,
    Finding,
    Report,
    RunInfo,
    StepEntry,
)
from compress.eval.report.terminal import print_report
from compress.system.files import sync
from compress.system.intake import read_limited, regular_file

_LARGEST = 256 * 2**20  # bytes; generated samples make reports of a few MB

__all__ = [
    "DataEntry",
    "Environment",
    "Finding",
    "Report",
    "RunInfo",
    "StepEntry",
    "environment",
    "findings",
    "load_report",
    "print_report",
    "render_html",
    "render_markdown",
    "with_findings",
    "write_report",
]


def with_findings(report: Report) -> Report:
    """Return the report with its findings filled in."""
    return report.model_copy(update={"findings": findings(report)})


def write_report(report: Report, folder: str | Path) -> dict[str, Path]:
    """Write report.json, report.md and report.html; each appears whole or not at all.

    Args:
        report: with its findings (:func:`with_findings`).
        folder: an existing folder.

    Returns:
        The paths by "json", "md" and "html".
    """
    forms = {
        "json": report.model_dump_json(indent=2) + "\n",
        "md": render_markdown(report),
        "html": render_html(report),
    }
    paths = {}
    for form, content in forms.items():
        paths[form] = Path(folder) / f"report.{form}"
        write_text(paths[form], content)
    return paths


def write_text(path: Path, content: str) -> None:
    """Write a file under a temporary name and rename it, durably.

    Raises:
        CompressError: the folder is missing or cannot be written, or the disk is full.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.write_text(content, encoding="utf-8")
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise CompressError(
            f"to write {path}", error.strerror or str(error),
            "Give a path in a folder that exists and can be written, and make room if it is full",
        ) from error  # fmt: skip


def load_report(path: str | Path) -> Report:
    """Read a report.json, or the one in a folder.

    Raises:
        CompressError: there is none, or it has another shape.
    """
    from pydantic import ValidationError

    path = Path(path)
    path = path / "report.json" if path.is_dir() else path
    regular_file(path, "a report.json", "Give the folder of a run")
    try:
        report = Report.model_validate_json(read_limited(path, "a report.json", _LARGEST))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise CompressError(
            "a report.json of this version", f"{place}: {first['msg']:.200}", where=str(path)
        ) from None
    # pydantic reads NaN, and never writes it: a report with one is no report of ours.
    if odd := _not_finite(report.model_dump()):
        raise CompressError("finite numbers in a report", f"{odd} without one", where=str(path))
    return report


def _not_finite(value: Any, path: str = "") -> str:
    """The path of the first number that is NaN or infinite, or ""."""
    if isinstance(value, float):
        return "" if math.isfinite(value) else path
    items = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list | tuple):
        items = enumerate(value)
    return next(filter(None, (_not_finite(v, f"{path}.{k}".lstrip(".")) for k, v in items)), "")
