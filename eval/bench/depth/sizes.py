"""A method that makes SmolLM2 shallower, at three sizes: the runs, and the rows of a run.

Every run also times decode and prefill against the original, in alternating pairs.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from compress.eval.bench.depth import LABEL, REMOVED, SEEDS, figure
from compress.eval.bench.options import publish
from compress.eval.bench.peer_material import MODEL, TEXT
from compress.eval.bench.rows import Row, of_seeds
from compress.eval.bench.runs import run_once, step_peak, step_seconds, write_recipe
from compress.eval.report import Report, load_report
from compress.planning.recipe import read_recipe

_SAMPLES = {"sleb": 16}  # a trial of each block, head and all: with 128 it takes an hour and a half
_SHIPPED = {  # recipes whose steps are measured
    "flatten": "flattengpt/smollm2-20", "fuse": "fusegpt/smollm2-20",
    "distilled": "flattengpt/smollm2-20-distill", "adapters": "flattengpt/smollm2-20-lora",
}  # fmt: skip


def steps_of(method: str, removed: int, arguments: Namespace) -> list[dict[str, Any]]:
    """Steps of a method; what has a shipped recipe is taken from there."""
    if method not in _SHIPPED:
        return [{"method": method, "remove": removed}]
    steps = yaml.safe_load(read_recipe(_SHIPPED[method]).to_yaml())["steps"]
    for step in steps:
        if "remove" in step or "share" in step:
            step.pop("share", None)
            step["remove"] = removed
        if arguments.smoke and step["method"] in ("fuse", "distill"):
            step["training"] = {**step.get("training", {}), "steps": 2}
    return steps


def run(
    work: Path, name: str, steps: list[dict[str, Any]], arguments: Namespace, seed: int = 0
) -> Path:
    """The folder of a run of these steps on SmolLM2."""
    smoke = arguments.smoke
    samples = min(_SAMPLES.get(step["method"], 128) for step in steps)
    path = write_recipe(
        work, name, model=MODEL, seed=seed,
        calibration={"text": {**TEXT, "split": "train"}, "samples": 4 if smoke else samples,
                     "length": 64 if smoke else 512},
        evaluation={"text": {**TEXT, "split": "test"}, "window": 256 if smoke else 1024,
                    "max_tokens": 1024 if smoke else 32_768, "memory": False},
        steps=steps,
    )  # fmt: skip
    return run_once(work, name, path.read_text("utf-8"), arguments.data_root)


def sizes(
    method: str, work: Path, arguments: Namespace, seeds: Sequence[int] = (0,),
    counts: Sequence[int] | None = None,
) -> list[Row]:  # fmt: skip
    """One method at all sizes, published as each is measured.

    Args:
        seeds: of the first size, which has the bars; the others are measured with the first seed.
        counts: how many blocks go; None: all sizes.
    """
    rows: list[Row] = []
    for removed in counts or removals(arguments):
        steps = steps_of(method, removed, arguments)
        outs = []
        for seed in seeds if removed == removals(arguments)[0] else seeds[:1]:
            name = f"{method}-{removed}" + (f"-seed{seed}" if seed else "")
            outs.append(run(work, name, steps, arguments, seed))
            publish(arguments, work, rows + size(method, removed, outs), "depth", whole=False)
        rows += size(method, removed, outs)
    return rows


def learned(
    method: str, work: Path, arguments: Namespace, counts: Sequence[int] | None = None
) -> list[Row]:
    """:func:`sizes` of a method that draws random numbers."""
    return sizes(method, work, arguments, SEEDS[:2] if arguments.smoke else SEEDS, counts)


def removals(arguments: Namespace) -> Sequence[int]:
    """How many blocks go."""
    return (2,) if arguments.smoke else REMOVED


def size(part: str, removed: int, outs: Sequence[Path], searched: bool = True) -> list[Row]:
    """A line of the table, of a run or of one for each seed.

    Args:
        searched: the runs have found what to remove; False where another one had, so that the
            step's time and memory say nothing.
    """
    label = f"{LABEL}, {part} -{removed} blocks"
    reports = [report_of(out) for out in outs]
    decode = [report.after.latency.decode for report in reports]
    rows = [
        figure(part, f"{label}: perplexity", **of_seeds([perplexity(out) for out in outs])),
        figure(part, f"{label}: parameters", reports[0].after.cost.size.parameters / 1e6, unit="M"),
        figure(part, f"{label}: decode, ms a token", **of_seeds([1e3 * d.after for d in decode]),
               unit="ms"),
        figure(part, f"{label}: decode speed-up", **of_seeds([d.speedup for d in decode]),
               unit="x", op=">="),
    ]  # fmt: skip
    if searched:
        time, peak = _BARS.get((part, removed), (None, None))
        rows += [
            figure(part, f"{label}: step time", **of_seeds([step_seconds(o) / 60 for o in outs]),
                   unit="min", bar=time),
            figure(part, f"{label}: step peak", **of_seeds([step_peak(o) / 1e9 for o in outs]),
                   unit="GB", bar=peak),
        ]  # fmt: skip
    return rows


_BARS = {  # minutes and GB of a step
    ("flatten", 6): (6.0, 3.0),
    ("distilled", 6): (60.0, None),
}


def dense(part: str, out: Path) -> list[Row]:
    """The line of the original, from any run on it."""
    before, latency = report_of(out).before, report_of(out).after.latency
    return [
        figure(part, f"{LABEL}, dense: perplexity", before.perplexity.perplexity),
        figure(part, f"{LABEL}, dense: parameters", before.cost.size.parameters / 1e6, unit="M"),
        figure(part, f"{LABEL}, dense: decode, ms a token", 1e3 * latency.decode.before, unit="ms"),
    ]  # fmt: skip


def report_of(out: Path) -> Report:
    return load_report(out / "report.json")


def perplexity(out: Path) -> float:
    return report_of(out).after.perplexity.perplexity
