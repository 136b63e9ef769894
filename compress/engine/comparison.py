"""Several finished runs beside each other, for Python and the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.eval.report import Report, load_report
from compress.eval.report.compare import Comparison, written
from compress.eval.report.compare import compare as put_together
from compress.system.files import refuse_existing
from compress.system.intake import user_path

_UNNAMED = "unnamed"  # what a recipe without a name is called


def compare(
    results: Sequence[str | Path | Report],
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    columns: Sequence[str] | None = None,
    sort: str = "quality",
) -> Comparison:
    """Put several results into one table and one plot of quality against cost.

    Args:
        results: run folders, report.json files, or reports as :func:`compress.evaluate` and
            ``compress.run(...).report`` give them. Each brings its original along; the same
            original counts once. Runs are called by their recipes, those without a name or with
            the same one by their folders.
        out: HTML file to write the page to, with the table as JSON and CSV beside it; no file if
            None.
        overwrite: replace files that lie there.
        columns: of the table: quality, size, bits, parameters, sparsity, macs, prefill, decode,
            memory, seconds and names of tasks; all that there is something to say of if None.
        sort: the column to sort by, the better first.

    Returns:
        The comparison: ``markdown()`` is its table, ``html()`` its page, ``frontier`` the names
        that no other one beats in both quality and a cost.

    Raises:
        CompressError: fewer than two models; a folder without a report, or a file that is none;
            results on different texts, windows or tasks, or without a quality in common; a page
            that is named like the JSON or CSV, is not to be overwritten, or cannot be written.
    """
    page = None if out is None else user_path(out, "a file for the page")
    files = () if page is None else written(page)
    if not overwrite:
        refuse_existing(*files)
    if isinstance(results, (str, Path, Report)):
        raise CompressError(
            "a list of results to compare", f"one {type(results).__name__}", "Give at least two"
        )
    comparison = put_together(_named(results), columns, sort)
    if page is not None:
        comparison.write(page)
    return comparison


def _named(results: Sequence[Any]) -> list[Report]:
    """The reports, under names that tell them apart as far as recipes and folders do."""
    reports = [_report(result) for result in results]
    titles = [report.title for report in reports]
    named = []
    for result, report in zip(results, reports, strict=True):
        place = None if isinstance(result, Report) else Path(result).absolute()
        if place is not None and (report.title == _UNNAMED or titles.count(report.title) > 1):
            folder = (place.parent if place.suffix == ".json" else place).name
            name = folder if report.title == _UNNAMED else f"{report.title}, {folder}"
            report = report.model_copy(update={"title": name})
        named.append(report)
    return named


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
