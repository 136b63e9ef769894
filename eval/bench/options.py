"""The command line that all benchmarks share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from compress.errors import CompressError
from compress.eval.bench.rows import DATA_ROOT, RESULTS, Row, print_rows, write_rows


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
    from compress.models.sources.cache import default_cache

    base = arguments.work or default_cache() / "bench"
    folder = base.expanduser().resolve() / (f"{name}-smoke" if arguments.smoke else name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def publish(
    arguments: argparse.Namespace,
    work: Path,
    rows: Iterable[Row],
    topic: str = "spine",
    *,
    whole: bool = True,
) -> None:
    """Print rows and merge them into the results file of a topic.

    Args:
        arguments: of the benchmark; where data were read from local copies, commands will say so.
        whole: these are all figures of their commands; others of the same commands disappear.
            False for what is published while a part is still being measured.
    """
    rows = list(rows)
    if getattr(arguments, "data_root", None) is not None:
        rows = [_with_data_root(row) for row in rows]
    path = results(arguments, work, topic)
    write_rows(path, rows, whole=whole)
    print_rows(rows)
    print(f"rows    {path}")
    if arguments.smoke:
        print(
            "note    a smoke run shows that the benchmark runs; its figures say nothing of the bars"
        )


def results(arguments: argparse.Namespace, work: Path, topic: str) -> Path:
    """The file that rows of a topic go into."""
    if arguments.results:
        return arguments.results
    return work / "smoke.json" if arguments.smoke else RESULTS / f"{topic}.json"


def _with_data_root(row: Row) -> Row:
    takes = row.command.startswith("python -m compress.eval.bench")
    if not takes or "--data-root" in row.command:
        return row
    return row.model_copy(update={"command": row.command + DATA_ROOT})


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
