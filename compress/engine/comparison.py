"""Several finished runs beside each other, for Python and the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.eval.report import Report, load_report
from compress.eval.report.compare import Comparison
from compress.eval.report.compare import compare as put_together
from compress.system.files import refuse_existing
from compress.system.intake import user_path


def compare(
    results: Sequence[str | Path | Report],
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
) -> Comparison:
    """Put several results into one table and one plot of quality against cost.

    Args:
        results: run folders, report.json files, or reports as :func:`compress.evaluate` and
            ``compress.run(...).report`` give them. Each brings its original along; the same
            original counts once.
        out: HTML file to write the page to; no file if None.
        overwrite: replace a file that lies there.

    Returns:
        The comparison: ``markdown()`` is its table, ``html()`` its page, ``frontier`` the names
        that no other one beats in both quality and a cost.

    Raises:
        CompressError: fewer than two models; a folder without a report, or a file that is none;
            results on different texts or windows, or without a quality in common; a page that is
            not to be overwritten, or cannot be written.
    """
    page = None if out is None else user_path(out, "a file for the page")
    if page is not None and not overwrite:
        refuse_existing(page)
    if isinstance(results, (str, Path, Report)):
        raise CompressError(
            "a list of results to compare", f"one {type(results).__name__}", "Give at least two"
        )
    comparison = put_together([_report(result) for result in results])
    if page is not None:
        comparison.write(page)
    return comparison


def _report(result: Any) -> Report:
    if isinstance(result, Report):
        return result
    if not isinstance(result, (str, Path)):
        raise CompressError(
            "run folders, report.json files or reports", f"a {type(result).__name__}",
            "compress.run(...) has a report in its result: give result.report",
        )  # fmt: skip
    path = user_path(result, "a run folder or a report.json")
    file = path / "report.json" if path.is_dir() else path
    if not file.exists():
        raise CompressError(
            "run folders with a report.json, or such files", str(path),
            "Run `compress run` or `compress evaluate --out` first",
        )  # fmt: skip
    return load_report(file)
