"""The columns of a comparison: what can be told of a model, as a cell and as plain data."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, TypeVar

from compress.errors import CompressError, did_you_mean
from compress.eval.cost.latency import PairedTimes
from compress.eval.cost.size import human_bytes
from compress.eval.report.cells import count, number, seconds
from compress.eval.report.page import Cell
from compress.eval.report.points import QualityAxis
from compress.eval.spec import EvaluationResult

Value = float | int | str | None


class Entry(NamedTuple):
    """One model in a comparison.

    Attributes:
        name: unique in a comparison.
        original: whether it is what others were made from.
        seconds: that its steps took; None where that is not known.
    """

    name: str
    result: EvaluationResult
    original: bool = False
    seconds: float | None = None


class Column(NamedTuple):
    """A column.

    Attributes:
        key: its name on the command line and in JSON and CSV.
        head: its title on the page.
        value: plain data of an entry: bytes, seconds, ratios, counts; None where there is none.
        cell: how the page shows an entry.
        lower: whether the lower value comes first when sorted by it.
    """

    key: str
    head: str
    value: Callable[[Entry], Value]
    cell: Callable[[Entry], Cell]
    lower: bool = True


def all_columns(entries: Sequence[Entry], quality: QualityAxis) -> list[Column]:
    """Every column that has something to say of at least one entry, quality first.

    Work, memory and speed depend on how many tokens they were measured with. A column has those of
    the first entry that has the figure; entries that were measured with others are left blank.
    """
    macs = _alike(entries, _macs, lambda e: e.result.cost.macs.context)
    memory = _alike(entries, _memory, lambda e: e.result.cost.memory.tokens)
    prefill, decode = (
        _alike(entries, lambda e, part=part: _times(e, part), _timed_tokens(part))
        for part in ("prefill", "decode")
    )

    def scored(entry: Entry) -> Cell:
        value, low, high = quality.of(entry.result)
        return number(value), f"{number(low)} to {number(high)}" if low is not None else ""

    columns = [
        Column(
            "quality", quality.label.partition(" (")[0], lambda e: quality.of(e.result)[0], scored,
            not quality.higher_is_better,
        ),
        Column(
            "size", "on disk", lambda e: e.result.cost.size.checkpoint_bytes,
            _shown(lambda e: e.result.cost.size.checkpoint_bytes, human_bytes),
        ),
        Column(
            "bits", "bits a weight", lambda e: e.result.cost.size.bits_per_weight,
            _shown(lambda e: e.result.cost.size.bits_per_weight, number),
        ),
        Column("parameters", "parameters", _parameters, _shown(_parameters, count)),
        Column("sparsity", "zeros", _sparsity, _shown(_sparsity, _percent), False),
        Column("macs", "MACs a token", macs, _shown(macs, count)),
        Column("prefill", "prefill speed", _speed(prefill), _timed(prefill), False),
        Column("decode", "decode speed", _speed(decode), _timed(decode), False),
        Column("memory", "peak memory", memory, _shown(memory, human_bytes)),
        *_task_columns(entries),
        Column(
            "seconds", "steps took", lambda e: e.seconds, _shown(lambda e: e.seconds, seconds)
        ),
    ]  # fmt: skip
    told = [c for c in columns if any(c.value(entry) is not None for entry in entries)]
    plain = not any(_sparsity(entry) for entry in entries)
    return [c for c in told if not (c.key == "sparsity" and plain)]


def chosen_columns(known: Sequence[Column], keys: Sequence[str] | None) -> list[Column]:
    """The columns of these keys in their order; all where no keys are given.

    Raises:
        CompressError: a column that there is not, or that no entry has.
    """
    if keys is None:
        return list(known)
    by_key = {column.key: column for column in known}
    for key in keys:
        if key not in by_key:
            raise CompressError(
                "columns that the results have", repr(key), did_you_mean(key, list(by_key)),
                where="columns",
            )  # fmt: skip
    return [by_key[key] for key in keys]


def _parameters(entry: Entry) -> int:
    return entry.result.cost.size.parameters


def _sparsity(entry: Entry) -> float:
    size = entry.result.cost.size
    return 1 - size.nonzero_parameters / size.parameters if size.parameters else 0.0


def _macs(entry: Entry) -> int:
    return entry.result.cost.macs.per_token


def _memory(entry: Entry) -> int | None:
    memory = entry.result.cost.memory
    return memory and memory.prefill


def _times(entry: Entry, part: str) -> PairedTimes | None:
    return entry.result.latency and getattr(entry.result.latency, part)


def _timed_tokens(part: str) -> Callable[[Entry], Hashable]:
    """What a speed was timed with: a decoded token costs by how many stand before it."""

    def tokens(entry: Entry) -> Hashable:
        timing = entry.result.latency
        decoded = timing.decode_tokens if part == "decode" else 0
        return timing.prefill_tokens, decoded

    return tokens


_Figure = TypeVar("_Figure")


def _alike(
    entries: Sequence[Entry],
    of: Callable[[Entry], _Figure | None],
    measured: Callable[[Entry], Hashable],
) -> Callable[[Entry], _Figure | None]:
    """A figure where it was measured as that of the first entry which has it, else None.

    Args:
        measured: how it was measured, of an entry that has it.
    """
    how = next((measured(entry) for entry in entries if of(entry) is not None), None)

    def figure(entry: Entry) -> _Figure | None:
        found = of(entry)
        return found if found is not None and measured(entry) == how else None

    return figure


_Timed = Callable[[Entry], PairedTimes | None]


def _speed(of: _Timed) -> Callable[[Entry], Value]:
    def value(entry: Entry) -> Value:
        timed = of(entry)
        return timed and timed.speedup

    return value


def _timed(of: _Timed) -> Callable[[Entry], Cell]:
    def cell(entry: Entry) -> Cell:
        timed = of(entry)
        if timed is None:
            return ""
        low, high = timed.interval
        return f"{timed.speedup:.2f}x", f"{low:.2f} to {high:.2f}"

    return cell


def _task_columns(entries: Sequence[Entry]) -> list[Column]:
    """A column a task: the first of its scores."""
    found: dict[str, str] = {}
    for entry in entries:
        tasks = entry.result.tasks.tasks if entry.result.tasks else {}
        for name, task in tasks.items():
            if task.metrics:
                found.setdefault(name, next(iter(task.metrics)))
    return [_task_column(entries, name, metric) for name, metric in found.items()]


def _task_column(entries: Sequence[Entry], name: str, metric: str) -> Column:
    def score(entry: Entry):
        task = entry.result.tasks and entry.result.tasks.tasks.get(name)
        return task and task.metrics.get(metric)

    def cell(entry: Entry) -> Cell:
        found = score(entry)
        if not found:
            return ""
        return number(found.value), f"± {number(1.96 * found.stderr)}" if found.stderr else ""

    higher = next((s.higher_is_better for e in entries if (s := score(e))), True)
    return Column(name, f"{name} {metric}", lambda e: (s := score(e)) and s.value, cell, not higher)


def _shown(value: Callable[[Entry], Value], form: Callable[[float], str]) -> Callable[[Entry], str]:
    def cell(entry: Entry) -> str:
        found = value(entry)
        return "" if found is None else form(found)

    return cell


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %" if share else ""
