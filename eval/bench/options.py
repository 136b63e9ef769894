"""The command line that all benchmarks share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from compress.errors import CompressError
from compress.eval.bench.rows import RESULTS, Row, print_rows, write_rows


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--results", type=Path, metavar="PATH",
        help="JSON file that the rows are merged into (default: the benchmark's file in "
        "eval/results, and smoke.json in the work folder with --smoke)",
    )  # fmt: skip
    made.add_argument(
        "--work", type=Path, metavar="DIR",
        help="models, logs and what an interrupted benchmark has measured so far "
        "(default: ~/.cache/compress/bench)",
    )  # fmt: skip
    made.add_argument(
        "--smoke", action="store_true",
        help="the same measurement at a size of a minute or two, to see that it runs",
    )  # fmt: skip
    return made


def work_folder(arguments: argparse.Namespace, name: str) -> Path:
    """The folder of one benchmark, made if needed; a smoke run has one of its own."""
    from compress.models.source_cache import default_cache

    base = arguments.work or default_cache() / "bench"
    folder = base.expanduser().resolve() / (f"{name}-smoke" if arguments.smoke else name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def publish(
    arguments: argparse.Namespace, work: Path, rows: Iterable[Row], topic: str = "spine"
) -> None:
    """Print rows and merge them into the results file of a topic."""
    rows = [as_typed(row, arguments) for row in rows]
    path = arguments.results or (
        work / "smoke.json" if arguments.smoke else RESULTS / f"{topic}.json"
    )
    write_rows(path, rows)
    print_rows(rows)
    print(f"rows    {path}")
    if arguments.smoke:
        print(
            "note    a smoke run shows that the benchmark runs; its figures say nothing of the bars"
        )


def as_typed(row: Row, arguments: argparse.Namespace) -> Row:
    """The row with ``--data-root DIR`` in its command, where local copies of data were given.

    A local copy may be a part of what the hub has: a figure says what it was measured on.
    """
    option = "--data-root"
    if getattr(arguments, "data_root", None) is None or option in row.command:
        return row
    return row.model_copy(update={"command": f"{row.command} {option} DIR"})


def entry(main: Callable[[], None]) -> None:
    """Run a benchmark's main function; errors of the user are a paragraph and exit status 2."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading a model: the benchmarks say what they are doing
    try:
        main()
    except CompressError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


def say(text: str) -> None:
    """A line of progress, at once."""
    print(text, file=sys.stderr, flush=True)
