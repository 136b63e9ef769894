"""The look of every HTML page: one style sheet and the pieces that pages are built from.

All text goes through :func:`text`; no function here takes markup from a model, a recipe or a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from compress.eval.report.cells import Row
from compress.system.intake import printable

STYLE = """
:root { color-scheme: light dark;
  --paper: #fbfaf8; --card: #ffffff; --ink: #1d2126; --soft: #5d6670; --line: #e3e1dc;
  --accent: #0f5f8c; --good: #17693f; --good-bg: #e2f2e8; --bad: #a12c1b; --bad-bg: #fbe7e2;
  --note-bg: #eef1f4; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14171a; --card: #1c2024; --ink: #e8e6e3; --soft: #9aa4ae; --line: #30363c;
  --accent: #6bb8e4; --good: #7fd0a1; --good-bg: #17352a; --bad: #f3a08f; --bad-bg: #41211b;
  --note-bg: #252b31; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 54rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; letter-spacing: -.015em; margin: 0 0 .35rem;
  overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.75rem 0 .75rem; letter-spacing: -.005em; }
p { margin: .5rem 0; }
.lead, .small, figcaption { color: var(--soft); }
.lead { overflow-wrap: anywhere; }
.small, figcaption { font-size: .85rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem;
  margin: 1.5rem 0 0; padding: 0; list-style: none; }
.tiles li { background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: .8rem 1rem .9rem; }
.tiles .name { display: block; font-size: .8rem; color: var(--soft); }
.tiles .value { display: block; font-size: 1.6rem; font-weight: 650; line-height: 1.3;
  letter-spacing: -.02em; font-variant-numeric: tabular-nums; }
.tiles .from { display: block; font-size: .8rem; color: var(--soft);
  font-variant-numeric: tabular-nums; }
.findings { list-style: none; margin: 0; padding: 0; display: grid; gap: .5rem; }
.findings li { padding: .6rem .9rem; border-radius: .5rem; background: var(--note-bg);
  display: flex; gap: .7rem; align-items: baseline; }
.findings .mark { flex: none; width: 1.1em; text-align: center; font-weight: 700; }
.findings .good { background: var(--good-bg); } .findings .good .mark { color: var(--good); }
.findings .warning { background: var(--bad-bg); } .findings .warning .mark { color: var(--bad); }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: .6rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .55rem .9rem; text-align: right; vertical-align: top; white-space: nowrap;
  border-top: 1px solid var(--line); }
thead th { border-top: 0; font-size: .8rem; font-weight: 600; color: var(--soft); }
tbody th { font-weight: 500; }
th:first-child, td:first-child, .left { text-align: left; }
th:first-child, td:first-child { white-space: normal; min-width: 8.5rem; }
main.wide { max-width: 76rem; }
.cards th, .cards td { padding: .5rem .55rem; font-size: .9rem; }
.cards thead th { white-space: normal; vertical-align: bottom; font-size: .78rem; }
.cards td:last-child { white-space: normal; }
.verdict { margin: 1.1rem 0 0; padding: .8rem 1rem; border-radius: .6rem; font-weight: 600;
  background: var(--note-bg); }
.verdict.good { background: var(--good-bg); color: var(--good); }
.verdict.warning { background: var(--bad-bg); color: var(--bad); }
.tiles .good { background: var(--good-bg); } .tiles .warning { background: var(--bad-bg); }
.texts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr));
  gap: .75rem; margin: 0 0 1.25rem; }
.texts p { margin: 0; padding: .7rem .9rem; background: var(--card); border-radius: .5rem;
  border: 1px solid var(--line); font-size: .9rem; overflow-wrap: anywhere;
  white-space: pre-wrap; }
.texts b { display: block; font-size: .78rem; color: var(--soft); font-weight: 600; }
.wrap { white-space: normal; min-width: 13rem; }
.digest { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .8em; }
td small { display: block; color: var(--soft); font-size: .78rem; font-weight: 400; }
.ratio { font-weight: 600; } .better { color: var(--good); } .worse { color: var(--bad); }
pre { margin: 0; padding: .9rem 1rem; overflow-x: auto; font: .82rem/1.5 ui-monospace,
  SFMono-Regular, Menlo, Consolas, monospace; background: var(--card);
  border: 1px solid var(--line); border-radius: .6rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.25rem; margin: 0 0 1rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
  gap: 1rem; }
.plots + .plots, .plots + .scroll, .scroll + .scroll { margin-top: 1rem; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: .9rem .9rem .7rem; }
.plot { display: block; width: 100%; max-width: 40rem; height: auto; margin: 0 auto;
  font-family: inherit; }
.plots figure:only-child .plot { max-width: 50rem; }
.plot text { fill: var(--soft); font-size: 11.5px; } .plot .title { font-size: 12px; }
.plot .label { fill: var(--ink); font-weight: 600; font-size: 12px; paint-order: stroke;
  stroke: var(--card); stroke-width: 4px; stroke-linejoin: round; }
.plot .label.other { font-weight: 400; }
.plot .grid { stroke: var(--line); } .plot .axis { stroke: var(--soft); }
.plot .dot { fill: var(--soft); stroke: var(--card); stroke-width: 1.5; }
.plot .dot.frontier { fill: var(--accent); } .plot .dot.original { fill: var(--ink); }
.plot .bar { stroke: var(--soft); stroke-width: 1.5; opacity: .7; }
.plot .bar.frontier { stroke: var(--accent); }
.plot .link, .plot .front { fill: none; stroke: var(--accent); stroke-width: 1.5; opacity: .6; }
.plot .front.original { stroke: var(--ink); }
.samples { display: block; max-width: 100%; height: auto; margin: 0 auto .5rem;
  image-rendering: pixelated; border-radius: .25rem; }
.plot .link { stroke-dasharray: 4 4; }
.plot .leader { stroke: var(--soft); stroke-width: .75; opacity: .7; }
.plot .dot:hover { stroke: var(--ink); stroke-width: 2.5; }
@media (max-width: 34rem) { main { padding: 1.5rem 1rem 3rem; } h1 { font-size: 1.4rem; }
  th, td { padding: .5rem .45rem; font-size: .875rem; }
  td small { white-space: normal; }
  th:first-child, td:first-child { padding-left: .7rem; min-width: 6.5rem; }
  .tiles { grid-template-columns: 1fr 1fr; }
  .tiles .value { font-size: 1.35rem; } dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .5rem; }
  .cards, .cards tbody, .cards tr, .cards td, .cards th { display: block; }
  .cards thead { display: none; }
  .cards tr { padding: .6rem .9rem; border-top: 1px solid var(--line); }
  .cards tbody tr:first-child { border-top: 0; }
  .cards tbody th { border: 0; padding: 0 0 .3rem; font-weight: 650; }
  .cards td { border: 0; padding: .12rem 0; display: flex; gap: .75rem;
    align-items: baseline; text-align: right; }
  .cards td::before { content: attr(data-name); color: var(--soft); text-align: left;
    margin-right: auto; }
  .cards td:empty { display: none; } .cards td small { margin-left: 0; } }
@media print { body { background: #fff; } .scroll, pre { overflow: visible; } }
"""


def text(value: Any) -> str:
    """Escape any value for HTML text and quoted attributes."""
    return escape(printable(str(value)), quote=True)


def page(title: str, body: Iterable[str], *, wide: bool = False) -> str:
    """Wrap sections into one self-contained page that loads nothing and runs no script.

    Args:
        wide: for tables of many columns.
    """
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + ('<main class="wide">\n' if wide else "<main>\n")
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(heading: str, *parts: str) -> str:
    """A heading and what belongs to it; nothing at all when there is nothing to show."""
    inside = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{text(heading)}</h2>\n{inside}\n</section>" if inside else ""


Cell = str | tuple[str, str]


def table(head: Sequence[str], rows: Iterable[Sequence[Cell]], left: Sequence[int] = ()) -> str:
    """A table that scrolls by itself; cells are escaped here, columns in ``left`` are prose.

    A cell of two strings is a value with a smaller line below it.
    """

    def cells(row: Sequence[Cell], tag: str) -> str:
        return "".join(
            f"<{tag}{_prose(i, left, tag)}>"
            f"{text(cell) if isinstance(cell, str) else _value(*cell)}</{tag}>"
            for i, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    if not body:
        return ""
    return (
        f'<div class="scroll"><table><thead><tr>{cells(head, "th")}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def cards(head: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """A table of many columns, which on a narrow screen becomes a card a row: all of it is seen."""
    heads = "".join(f"<th>{text(name)}</th>" for name in head)
    body = ""
    for first, *others in rows:
        cells = "".join(
            f'<td data-name="{text(name)}">{text(c) if isinstance(c, str) else _value(*c)}</td>'
            for name, c in zip(head[1:], others, strict=True)
            if c or name
        )
        shown = first if isinstance(first, str) else first[0]
        body += f'<tr><th scope="row">{text(shown)}</th>{cells}</tr>'
    return (
        f'<div class="scroll"><table class="cards"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _prose(column: int, left: Sequence[int], tag: str) -> str:
    if column not in left:
        return ""
    return ' class="left"' if tag == "th" else ' class="left wrap"'


def rows_table(rows: Sequence[Row]) -> str:
    """The table of before, after and ratio; one column of values where there is no original."""
    if not rows:
        return ""
    paired = any(row.before for row in rows)
    head = ["", "before", "after", "ratio"] if paired else ["", "value"]
    body = "".join(_row(row, paired) for row in rows)
    heads = "".join(f"<th>{h}</th>" for h in head)
    return (
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _row(row: Row, paired: bool) -> str:
    tone = {-1: " worse", 0: "", 1: " better"}[row.better]
    cells = [f'<th scope="row">{text(row.name)}</th>']
    if paired:
        cells.append(f"<td>{_value(row.before, row.error_before)}</td>")
    cells.append(f"<td>{_value(row.after, row.error_after)}</td>")
    if paired:
        cells.append(f'<td class="ratio{tone}">{_value(row.ratio, row.error_ratio)}</td>')
    return f"<tr>{''.join(cells)}</tr>"


def _value(value: str, error: str) -> str:
    small = f"<small>{text(error)}</small>" if error else ""
    return text(value) + small


def definitions(pairs: Iterable[tuple[str, Any]]) -> str:
    """A list of names and values; empty values are left out."""
    shown = [(k, v) for k, v in pairs if v not in (None, "")]
    inside = "".join(f"<dt>{text(k)}</dt><dd>{text(v)}</dd>" for k, v in shown)
    return f"<dl>{inside}</dl>" if inside else ""


def figure(drawing: str, caption: str) -> str:
    """A plot with its caption."""
    return f"<figure>{drawing}<figcaption>{text(caption)}</figcaption></figure>"
