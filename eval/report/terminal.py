"""The table on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.eval.report.rows import Row, cost_rows, quality_rows
from compress.eval.report.runtime_rows import HEAD, runtime_rows
from compress.eval.report.schema import Report
from compress.eval.report.verdict import verdict
from compress.system.intake import printable

if TYPE_CHECKING:
    from rich.console import Console

_SHOWN = 6  # columns of the table of runtimes that fit a terminal
_TONES = {-1: "red", 0: "", 1: "green"}


def print_report(report: Report, console: Console | None = None) -> None:
    """Print quality and cost as before | after | ratio, then the findings."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    table = Table(title=Text(printable(report.title)), title_justify="left", header_style="bold")
    paired = report.before is not None
    table.add_column("")
    for name in ("before", "after", "ratio") if paired else ("value",):
        table.add_column(name, justify="right")
    if found := verdict(report):
        tone = {"warning": "bold red", "good": "bold green", "note": "bold"}[found.tone]
        console.print(Text(printable(found.text), style=tone))
    groups = [g for g in (quality_rows(report), cost_rows(report)) if g]
    for rows in groups:
        for row in rows:
            table.add_row(*_cells(row, paired))
        table.add_section()
    console.print(table)
    _print_runtimes(report, console)
    for finding in report.findings:
        tone = {"warning": "red", "good": "green", "note": "dim"}[finding.level]
        # Text, not markup: square brackets of an interval would be read as style tags.
        console.print(Text(f"{finding.level:>7}  ", style=tone) + Text(printable(finding.text)))


def _print_runtimes(report: Report, console: Console) -> None:
    """Speeds against the original in transformers; the rest of the table is in the files."""
    from rich.table import Table
    from rich.text import Text

    rows = runtime_rows(report)
    if not rows:
        return
    table = Table(header_style="bold")
    for name in HEAD[:_SHOWN]:
        table.add_column(name, justify="left" if name == HEAD[0] else "right")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row[:_SHOWN]))
    console.print(table)


def _cells(row: Row, paired: bool) -> list:
    from rich.text import Text

    def value(shown: str, error: str, style: str = "") -> Text:
        return Text(printable(shown), style=style) + Text(
            f"\n{error}" if error else "", style="dim"
        )

    if not paired:
        return [Text(printable(row.name)), value(row.after, row.error_after)]
    return [
        Text(printable(row.name)),
        value(row.before, row.error_before),
        value(row.after, row.error_after),
        value(row.ratio, row.error_ratio, _TONES[row.better]),
    ]
