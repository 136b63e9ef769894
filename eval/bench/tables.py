"""Tables of measured figures in documents, rendered from the files that benchmarks write.

    python -m compress.eval.bench.tables README.md docs/benchmarks.md

Replaces what stands between `<!-- results:NAME -->` and `<!-- /results -->` by the rows of
eval/results/NAME.json; `<!-- results:NAME bars -->` shows only the rows that have a bar,
`<!-- results:NAME figures:WORD -->` only the figures whose name begins with the word, and
`<!-- results:NAME pivot:WORD -->` those of the form "WORD, thing: measure" as a table with a line a
thing and a column a measure. The markers stay, so the command can be repeated after each
measurement. A dagger marks a figure whose code has changed since it was measured
(`eval/bench/provenance.py` says what that means).
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from pathlib import Path

from compress.errors import CompressError
from compress.eval.bench.options import entry
from compress.eval.bench.provenance import changed_since
from compress.eval.bench.rows import RESULTS, Row, number, read_rows, shown

_BLOCK = re.compile(
    r"(<!-- results:(?P<name>[\w-]+)(?P<bars> bars)?"
    r"(?: figures:(?P<start>[\w-]+)| pivot:(?P<pivot>[\w-]+))? -->\n)"
    r".*?(<!-- /results -->)",
    re.DOTALL,
)
_MARK = " †"
_MEANING = (
    "† Measured by earlier code: what the command runs has changed since, or the row does not say "
    "which code it was."
)
_OPENING, _CLOSING = "<!-- results:", "<!-- /results -->"


def table(rows: list[Row], bars_only: bool = False) -> str:
    """Rows as a Markdown table, in the order given."""
    rows = [row for row in rows if row.bar is not None or not bars_only]
    if not rows:
        return "_Not measured yet._\n"
    peers = any(row.peer is not None for row in rows)
    columns = ["figure", "measured", *(["other tool"] if peers else []), "bar", "met", "command"]
    lines = [columns, ["---", "---:", *(["---:"] if peers else []), "---:", "---", "---"]]
    for row in rows:
        unit = f" {row.unit}" if row.unit else ""
        lines.append(
            [
                row.figure, shown(row) + unit + _mark(row),
                *(["" if row.peer is None else number(row.peer) + unit] if peers else []),
                "" if row.bar is None else f"{row.op} {number(row.bar)}{unit}",
                {None: "", True: "yes", False: "**no**"}[row.met], f"`{row.command}`",
            ]
        )  # fmt: skip
    return _grid(lines) + _notes(rows)


def pivot(rows: list[Row], word: str) -> str:
    """Rows named "WORD, thing: measure" as a Markdown table of things by measures."""
    things: dict[str, dict[str, str]] = {}
    measures: dict[str, None] = {}
    used: list[Row] = []
    for row in rows:
        thing, colon, measure = row.figure.removeprefix(f"{word}, ").rpartition(": ")
        if not colon or not row.figure.startswith(f"{word}, "):
            continue
        unit = f" ({row.unit})" if row.unit else ""
        measures[measure + unit] = None
        things.setdefault(thing, {})[measure + unit] = shown(row) + _mark(row)
        used.append(row)
    if not things:
        return "_Not measured yet._\n"
    columns = sorted(measures, key=_by_numbers)
    lines = [[word, *columns], ["---", *["---:"] * len(columns)]]
    order = sorted(things, key=lambda thing: (thing != "dense", thing))
    lines += [[thing, *(things[thing].get(c, "") for c in columns)] for thing in order]
    return f"{_grid(lines)}{_notes(used)}\n`{used[-1].command}`\n"


def _grid(lines: list[list[str]]) -> str:
    return "".join("| " + " | ".join(_cell(c) for c in line) + " |\n" for line in lines)


def _mark(row: Row) -> str:
    return _MARK if changed_since(row.commit, row.command) else ""


def _notes(rows: list[Row]) -> str:
    """What stands below a table: seeds, machines, and what the dagger means."""
    notes = []
    if seeds := sorted({row.seeds for row in rows if row.seeds is not None}):
        many = " or ".join(map(str, seeds))
        notes.append(f"With a range: median, lowest and highest of {many} seeds.")
    counts = Counter(row.processor for row in rows if row.processor is not None)
    if len(counts) == 1:
        notes.append(f"Measured on: {next(iter(counts))}.")
    elif counts:
        machines = "; ".join(f"{name} ({count})" for name, count in counts.most_common())
        notes.append(f"Measured on (rows): {machines}.")
    if any(_mark(row) for row in rows):
        notes.append(_MEANING)
    return "".join(f"\n{note}\n" for note in notes)


def _by_numbers(text: str) -> list[tuple[int, str]]:
    """A key that sorts "8 steps" before "16 steps"."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def render(text: str, results: Path = RESULTS, where: str = "document") -> str:
    """Fill every marked place in a Markdown text.

    Raises:
        CompressError: a marker without its other half, or a results file that does not parse.
    """
    blocks = len(_BLOCK.findall(text))
    if not blocks == text.count(_OPENING) == text.count(_CLOSING):
        raise CompressError(
            f"pairs of `{_OPENING}NAME -->` and `{_CLOSING}`, each on a line of its own",
            f"{text.count(_OPENING)} openings, {text.count(_CLOSING)} ends, {blocks} pairs",
            where=where,
        )

    def fill(match: re.Match[str]) -> str:
        rows = read_rows(results / f"{match['name']}.json")
        if match["pivot"] is not None:
            return match[1] + pivot(rows, match["pivot"]) + match.groups()[-1]
        rows = [row for row in rows if row.figure.startswith(match["start"] or "")]
        return match[1] + table(rows, bars_only=match["bars"] is not None) + match.groups()[-1]

    return _BLOCK.sub(fill, text)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("files", nargs="+", type=Path, help="Markdown files")
    options.add_argument(
        "--results", type=Path, default=RESULTS, metavar="DIR", help="folder of the JSON files"
    )
    arguments = options.parse_args()
    for path in arguments.files:
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise CompressError("a Markdown file", f"{path}: {error.strerror}") from None
        rendered = render(text, arguments.results, str(path))
        if rendered != text:
            path.write_text(rendered, encoding="utf-8")
        print(f"{path}: {'updated' if rendered != text else 'unchanged'}")


if __name__ == "__main__":
    entry(main)
