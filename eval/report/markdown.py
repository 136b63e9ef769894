"""report.md: the same content for a terminal, a repository or a model card."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from compress.eval.cost.size import human_bytes
from compress.eval.report.html import shipped_as, written_options
from compress.eval.report.rows import Row, cost_rows, quality_rows, seconds
from compress.eval.report.runtime_rows import HEAD, NOTE, runtime_rows
from compress.eval.report.samples import continued, samples_table
from compress.eval.report.schema import Report
from compress.eval.report.verdict import verdict
from compress.system.intake import printable

_SPECIAL = re.compile(r"([\\`*_\[\]|<>#])")


def plain(value: object) -> str:
    """Escape Markdown, HTML and what a terminal obeys, and keep the value on one line."""
    return _SPECIAL.sub(r"\\\1", printable(" ".join(str(value).split())))


def render_markdown(report: Report) -> str:
    """Return the report as Markdown (GitHub's tables)."""
    run, machine = report.run, report.environment
    shipped = f" (shipped as {plain(shipped_as(run))})" if run.source_bytes else ""
    parts = [f"# {plain(report.title)}", f"Model: {plain(run.model)}{shipped}"]
    if found := verdict(report):
        parts.insert(1, f"**{plain(found.text)}**")
    if report.findings:
        parts += [
            "## Findings",
            "\n".join(f"- {f.level}: {plain(f.text)}" for f in report.findings),
        ]
    for heading, rows in (("Quality", quality_rows(report)), ("Cost", cost_rows(report))):
        if rows:
            parts += [f"## {heading}", rows_markdown(rows)]
    if rows := runtime_rows(report):
        parts += ["## Runtimes", grid(HEAD, rows), plain(NOTE)]
    shown = continued(report)
    parts += ["## Continuations"] if shown else []
    for prompt, told in shown:
        parts += [f"> {plain(prompt)}"] + [f"*{name}*: {plain(said)}" for name, said in told]
    head, rows = samples_table(report)
    if rows:
        parts.insert(-2, "## Samples")
        parts.insert(-2, grid(head, rows))
    if report.steps:
        parts += ["## Steps", _steps(report)]
    if report.data:
        parts += ["## Data", _data(report)]
    parts += ["## What was run", *_run(report)]
    versions = ", ".join(f"{k} {v}" for k, v in machine.versions.items())
    parts += [
        "## Environment",
        f"{plain(machine.platform)}, {plain(machine.cpu)}, {machine.cores} cores, "
        f"{machine.threads} threads, {human_bytes(machine.memory_bytes)}; {plain(versions)}",
    ]
    return "\n\n".join(parts) + "\n"


def rows_markdown(rows: Sequence[Row]) -> str:
    """Before, after, ratio as a table; one value column where there is no original."""
    if any(row.before for row in rows):
        return grid(
            ("", "before", "after", "ratio"),
            (
                (
                    r.name,
                    _with(r.before, r.error_before),
                    _with(r.after, r.error_after),
                    _with(r.ratio, r.error_ratio),
                )
                for r in rows
            ),
        )
    return grid(("", "value"), ((r.name, _with(r.after, r.error_after)) for r in rows))


def grid(head: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """A Markdown table; the columns in ``left`` are prose, the others numbers."""
    rules = ["---" if i in left else "---:" for i in range(len(head))]
    lines = ["| " + " | ".join(line) + " |" for line in (head, rules)]
    lines += ["| " + " | ".join(plain(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _with(value: str, error: str) -> str:
    return f"{value} ({error})" if error else value


def _steps(report: Report) -> str:
    return grid(
        ("step", "what it did", "options", "time", "peak memory"),
        (
            (
                step.method,
                " ".join([step.summary, *step.notes]),
                written_options(step.options),
                seconds(step.seconds) if step.seconds is not None else "",
                human_bytes(step.peak_rss_bytes) if step.peak_rss_bytes else "",
            )
            for step in report.steps
        ),
        left=(0, 1, 2),
    )


def _data(report: Report) -> str:
    return grid(
        ("role", "name", "tokens", "licence", "sha256"),
        (
            (
                entry.role,
                entry.name + (f": {entry.detail}" if entry.detail else ""),
                f"{entry.tokens:,}" if entry.tokens else "",
                entry.licence or "",
                entry.sha256 or "",
            )
            for entry in report.data
        ),
        left=(0, 1, 3, 4),
    )


def _run(report: Report) -> list[str]:
    import yaml

    run = report.run
    parts = []
    if run.command:
        parts.append("    " + " ".join(run.command.split()))
    if run.seed is not None:
        parts.append(f"Seed {run.seed}.")
    if run.compute is not None:
        parts.append(f"Matrix products of calibration passes in {plain(run.compute)}.")
    if run.recipe is not None:
        recipe = yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True)
        # An indented block cannot be closed by what stands inside it, as a fence can.
        parts.append("\n".join("    " + line for line in recipe.splitlines()))
    return parts
