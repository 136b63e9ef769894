"""Plain tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from compress.system.intake import printable


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()
) -> None:
    """Print rows of strings; columns whose positions are in ``right`` are aligned to the right."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=escape(printable(title)),
        title_justify="left",
        box=None,
        pad_edge=False,
        header_style="bold",
    )
    for position, column in enumerate(columns):
        table.add_column(column, justify="right" if position in right else "left")
    for row in rows:
        table.add_row(*(escape(printable(cell)) for cell in row))
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # a pipe or a file has no width to fit into
    console.print(table)
