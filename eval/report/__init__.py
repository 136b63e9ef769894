"""Reports: a typed result, and its forms as JSON, Markdown, HTML and a terminal table."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

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
from compress.files import disk_error, sync

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
        CompressError: the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.write_text(content, encoding="utf-8")
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise disk_error(path.parent, error) from error


def load_report(path: str | Path) -> Report:
    """Read a report.json, or the one in a folder.

    Raises:
        CompressError: there is none, or it has another shape.
    """
    from pydantic import ValidationError

    path = Path(path)
    path = path / "report.json" if path.is_dir() else path
    if not path.is_file():
        raise CompressError("a report.json", f"nothing at {path}", "Give the folder of a run")
    try:
        return Report.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise CompressError(
            "a report.json of this version", f"{place}: {first['msg']}", where=str(path)
        ) from None
