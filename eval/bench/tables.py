"""Tables of measured figures in documents, rendered from the files that benchmarks write.

    python -m eval.bench.tables README.md docs/benchmarks.md

Replaces what stands between `<!-- results:NAME -->` and `<!-- /results -->` by the rows of
eval/results/NAME.json; `<!-- results:NAME bars -->` shows only the rows that have a bar,
`<!-- results:NAME figures:WORD -->` only the figures whose name begins with the word. The markers
stay, so the command can be repeated after each measurement.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from compress.errors import CompressError
from eval.bench.options import entry
from eval.bench.rows import RESULTS, Row, number, read_rows

_BLOCK = re.compile(
    r"(<!-- results:(?P<name>[\w-]+)(?P<bars> bars)?(?: figures:(?P<start>[\w-]+))? -->\n)"
    r".*?(<!-- /results -->)",
    re.DOTALL,
)
_OPENING, _CLOSING = "<!-- results:", "<!-- /results -->"


def table(rows: list[Row], bars_only: bool = False) -> str:
    """Rows as a Markdown table, in the order given."""
    shown = [row for row in rows if row.bar is not None or not bars_only]
    if not shown:
        return "_Not measured yet._\n"
    peers = any(row.peer is not None for row in shown)
    columns = ["figure", "measured", *(["other tool"] if peers else []), "bar", "met", "command"]
    lines = [columns, ["---", "---:", *(["---:"] if peers else []), "---:", "---", "---"]]
    for row in shown:
        unit = f" {row.unit}" if row.unit else ""
        lines.append(
            [
                row.figure, number(row.value) + unit,
                *(["" if row.peer is None else number(row.peer) + unit] if peers else []),
                "" if row.bar is None else f"{row.op} {number(row.bar)}{unit}",
                {None: "", True: "yes", False: "**no**"}[row.met], f"`{row.command}`",
            ]
        )  # fmt: skip
    return "".join("| " + " | ".join(_cell(c) for c in line) + " |\n" for line in lines)


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
