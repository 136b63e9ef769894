"""Compare runs: one table, and which of them nothing else beats (the Pareto frontier)."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from compress.errors import CompressError
from compress.eval.cost.size import human_bytes
from compress.eval.report import write_text
from compress.eval.report.columns import Column, Entry, all_columns, chosen_columns
from compress.eval.report.html import plot_caption
from compress.eval.report.markdown import grid
from compress.eval.report.page import Cell, cards, figure, page, section, text
from compress.eval.report.plot import scatter
from compress.eval.report.points import (
    CostAxis,
    QualityAxis,
    cost_axes,
    format_quality,
    point,
    quality_axis,
)
from compress.eval.report.schema import Report
from compress.eval.report.verdict import short_source


class Comparison(NamedTuple):
    """Entries with the axes they can be compared on.

    Attributes:
        entries: originals first, then sorted.
        quality: the quality that all of them have.
        costs: the costs that all have and that differ, at least one.
        frontier: per cost label, the names that no other entry beats in both quality and cost.
        columns: of the table.
    """

    entries: tuple[Entry, ...]
    quality: QualityAxis
    costs: tuple[CostAxis, ...]
    frontier: dict[str, frozenset[str]]
    columns: tuple[Column, ...]

    def head(self) -> tuple[str, ...]:
        """The table's head."""
        return ("", *(column.head for column in self.columns), "unbeaten in")

    def rows(self) -> list[tuple[Cell, ...]]:
        """The table's cells; a pair is a value and what stands below it."""
        return [
            (e.name, *(column.cell(e) for column in self.columns), ", ".join(self._unbeaten(e)))
            for e in self.entries
        ]

    def _unbeaten(self, entry: Entry) -> list[str]:
        return [c.short for c in self.costs if entry.name in self.frontier[c.label]]

    def html(self) -> str:
        """One self-contained page."""
        figures = [figure(self._plot(cost), plot_caption(self.quality)) for cost in self.costs]
        names = "  ·  ".join(entry.name for entry in self.entries if not entry.original)
        return page(
            "Comparison",
            [
                f'<header><h1>Comparison</h1><p class="lead">{text(names)}</p></header>',
                section(
                    "Quality against cost",
                    f'<div class="plots">{"".join(figures)}</div>',
                    '<p class="small">Filled in colour and joined: the models that no other one '
                    "beats in both. Point at one for its figures.</p>",
                ),
                section("Table", cards(self.head(), self.rows())),
            ],
            wide=True,
        )

    def markdown(self) -> str:
        """The table as Markdown."""
        flat = ([c if isinstance(c, str) else _flat(*c) for c in row] for row in self.rows())
        return grid(self.head(), flat, left=(0, len(self.columns) + 1)) + "\n"

    def data(self) -> dict[str, Any]:
        """The table as plain data: bytes, seconds, multiply-accumulates, speeds as ratios."""
        return {
            "quality": self.quality.label,
            "higher_is_better": self.quality.higher_is_better,
            "entries": [self._data(entry) for entry in self.entries],
        }

    def _data(self, entry: Entry) -> dict[str, Any]:
        _, low, high = self.quality.of(entry.result)
        return {
            "name": entry.name,
            "original": entry.original,
            **{column.key: column.value(entry) for column in self.columns},
            "low": low,
            "high": high,
            "unbeaten_in": self._unbeaten(entry),
        }

    def csv(self) -> str:
        """The same, a line an entry."""
        lines = io.StringIO()
        rows = [{**row, "unbeaten_in": " ".join(row["unbeaten_in"])} for row in
                self.data()["entries"]]  # fmt: skip
        writer = csv.DictWriter(lines, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return lines.getvalue()

    def write(self, path: str | Path) -> Path:
        """Write the page to ``path``, and the table beside it as JSON and CSV."""
        forms = {"": self.html(), ".json": json.dumps(self.data(), indent=2) + "\n",
                 ".csv": self.csv()}  # fmt: skip
        for file, content in zip(written(path), forms.values(), strict=True):
            write_text(file, content)
        return Path(path)

    def _plot(self, cost: CostAxis) -> str:
        best = self.frontier[cost.label]

        def style(entry: Entry) -> str:
            if entry.name in best:
                return "frontier"
            return "original" if entry.original else "other"

        points = [point(e.name, e.result, cost, self.quality, style(e)) for e in self.entries]
        return scatter(
            points, cost.label, self.quality.label, cost.format, format_quality, frontier=True
        )


def written(page: str | Path) -> tuple[Path, Path, Path]:
    """The files of a comparison: its page, and beside it JSON and CSV.

    Raises:
        CompressError: a page in whose place one of the others would be written.
    """
    path = Path(page)
    if path.suffix.lower() in (".json", ".csv"):
        raise CompressError(
            "a name for an HTML page (the table goes beside it as JSON and CSV)", path.name,
            f"Use {path.with_suffix('.html').name}", where="compare",
        )  # fmt: skip
    return path, path.with_suffix(".json"), path.with_suffix(".csv")


def _flat(value: str, below: str) -> str:
    return f"{value} ({below})" if below else value


def compare(
    results: Sequence[Report | Entry],
    columns: Sequence[str] | None = None,
    sort: str = "quality",
) -> Comparison:
    """Put results side by side.

    Args:
        results: reports (each brings its original along; the same original counts once) or
            entries, at least two models in all.
        columns: keys of :mod:`compress.eval.report.columns`; all that there is something to say of
            if None.
        sort: the column to sort by, the better first; originals stand in front.

    Costs that were measured differently (MACs at another context, memory or speed at another
    length) do not refuse a comparison: :func:`compress.eval.report.columns.all_columns` leaves them
    blank, and no frontier is drawn of them.

    Raises:
        CompressError: fewer than two, texts, windows, masks or tasks that were measured
            differently, no quality in common, or columns that there are not.
    """
    entries = _entries(results)
    if len(entries) < 2:
        raise CompressError("at least two results to compare", str(len(entries)))
    _same_protocol(entries)
    found = [entry.result for entry in entries]
    quality = quality_axis(found)
    if quality is None:
        raise CompressError(
            "results with a quality in common (perplexity, masked scores, labels or a task)",
            ", ".join(f"{e.name} ({e.result.kind})" for e in entries),
            "Evaluate them with the same options",
        )
    costs = tuple(cost_axes(found))
    known = all_columns(entries, quality)
    (by,) = chosen_columns(known, [sort])
    return Comparison(
        _sorted(entries, by), quality, costs,
        {c.label: _frontier(entries, c, quality) for c in costs},
        tuple(chosen_columns(known, columns)),
    )  # fmt: skip


def _sorted(entries: Sequence[Entry], by: Column) -> tuple[Entry, ...]:
    """Originals, then by a column; those without a value at the end."""

    def place(entry: Entry) -> tuple:
        value = by.value(entry)
        if value is None:
            return (not entry.original, 1, 0)
        return (not entry.original, 0, value if by.lower else -value)

    return tuple(sorted(entries, key=place))


def _entries(results: Sequence[Report | Entry]) -> tuple[Entry, ...]:
    originals: dict[str, Entry] = {}
    others: list[Entry] = []
    for result in results:
        if isinstance(result, Entry):
            others.append(result)
            continue
        took = [step.seconds for step in result.steps if step.seconds is not None]
        others.append(Entry(result.title, result.after, seconds=sum(took) if took else None))
        if result.before:
            key = f"{result.run.model} {result.run.model_sha256}"
            shipped = result.run.source_bytes
            unpacked = f", unpacked from {human_bytes(shipped)}" if shipped else ""
            name = f"original ({short_source(result.run.model)}{unpacked})"
            originals.setdefault(key, Entry(name, result.before, original=True))
    seen: dict[str, int] = {}
    unique = []
    for entry in (*originals.values(), *others):
        seen[entry.name] = seen.get(entry.name, 0) + 1
        again = f" ({seen[entry.name]})" if seen[entry.name] > 1 else ""
        unique.append(entry._replace(name=entry.name + again))
    return tuple(unique)


def _same_protocol(entries: Sequence[Entry]) -> None:
    """Figures of two texts, windows, masks or tokenizers cannot be compared, nor those of a task
    that was asked in two ways."""
    first = entries[0]
    for entry in entries[1:]:
        _refuse_other(_text(first), _text(entry), "tokens and windows", first, entry)
    asked: dict[str, tuple[dict[str, Any], Entry]] = {}
    read: dict[str, tuple[dict[str, str], Entry]] = {}
    for entry in entries:
        for name in entry.result.tasks.tasks if entry.result.tasks else ():
            other = _task(entry, name)
            how, earlier = asked.setdefault(name, (other, entry))
            _refuse_other(how, other, f"documents and prompts of {name}", earlier, entry)
            # Of data from the hub no digest is known.
            if files := entry.result.tasks.tasks[name].files:
                known, earlier = read.setdefault(name, (files, entry))
                if known != files:
                    _refuse_other({}, {"files": files}, f"files of {name}", earlier, entry)


def _text(entry: Entry) -> dict[str, Any]:
    """What a quality of texts or examples was measured on, and how."""
    bound = entry.result.generator and entry.result.generator.likelihood
    scored = entry.result.perplexity or bound or entry.result.masked
    if scored is None and entry.result.labels is None:
        return {}
    told = {"text": entry.result.tokens_sha256}
    if scored is None:
        return told
    # Beside the text, what decides which masks a score is of: models with others hid other tokens.
    fields = (
        "window", "stride", "packing", "mask_fraction", "sequences", "seed", "draws", "estimator",
    )  # fmt: skip
    told |= {name: getattr(scored, name, None) for name in fields}
    return {**told, "special_tokens": getattr(scored, "special_tokens", 0)}


def _task(entry: Entry, name: str) -> dict[str, Any]:
    tasks, spec = entry.result.tasks, entry.result.spec
    task = tasks.tasks[name]
    asked = {
        "limit": tasks.limit, "score": tasks.score, "num_fewshot": task.num_fewshot,
        "version": task.version, "special_tokens": spec.special_tokens,
    }  # fmt: skip
    if tasks.score == "bound":  # an estimate, of as many masks
        asked |= {"draws": spec.masked_tasks.draws, "seed": spec.masked_tasks.seed}
    return asked


def _refuse_other(
    first: dict[str, Any], second: dict[str, Any], what: str, one: Entry, other: Entry
) -> None:
    if first == second:
        return
    known = [name for name in first if name in second and first[name] != second[name]]
    told = [f"{n} {second[n]} and not {first[n]}" for n in known if n != "text"]
    raise CompressError(
        f"results on the same {what} as {one.name}",
        f"{other.name}, which was measured " + (f"with {', '.join(told)}" if told else "on others"),
        "Evaluate both on the same data with the same tokenizer and options",
        where="compare",
    )


def _frontier(entries: Sequence[Entry], cost: CostAxis, quality: QualityAxis) -> frozenset[str]:
    """Names of the entries that no other one dominates."""
    sign = -1 if quality.higher_is_better else 1
    placed = [(e.name, cost.of(e.result), sign * quality.of(e.result)[0]) for e in entries]
    return frozenset(
        name
        for name, x, y in placed
        if not any(a <= x and b <= y and (a, b) != (x, y) for _, a, b in placed)
    )
