"""SmolLM2 with a fifth of its block parameters gone: a line of the table from a recipe's run.

SmolLM2-135M-Instruct in float32, calibrated on the head of WikiText-2 raw train, tested on the
first 32,768 tokens of its test split in windows of 1,024.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from compress.eval.bench.rows import Row
from compress.eval.bench.runs import run_once, step_peak, step_seconds
from compress.eval.bench.vib import figure
from compress.eval.report import load_report
from compress.planning.recipe import Recipe, read_recipe

LABEL, SHARE = "SmolLM2", 0.2
PERPLEXITY = "perplexity"
THING = f"{{}} -{round(100 * SHARE)} % of the blocks"
SHORT = ("steps.0.start_batches=2", "steps.0.correction_batches=2", "steps.0.tuning.steps=2")
_SMALL = (
    "calibration.samples=4", "calibration.length=64", "evaluation.max_tokens=1024",
    "evaluation.window=256", "evaluation.memory=false",
)  # fmt: skip


def recipe_of(name: str, arguments: Namespace, *small: str) -> Recipe:
    """A shipped recipe; for a smoke run a short one, with further overrides."""
    return read_recipe(f"vtrans/{name}", [*_SMALL, *small] if arguments.smoke else [])


def measured(
    part: str, thing: str, recipe: Recipe, work: Path, arguments: Namespace, **bars: float
) -> list[Row]:
    """A line of the table, after the run of a recipe."""
    out = run_once(work, part.replace("_", "-"), recipe.to_yaml(), arguments.data_root)
    report = load_report(out / "report.json")
    label = f"{LABEL}, {THING.format(thing)}"
    sizes = [r.cost.size.block_weights for r in (report.before, report.after)]
    found = [
        figure(part, f"{label}: {PERPLEXITY}", report.after.perplexity.perplexity),
        figure(part, f"{label}: parameters", report.after.cost.size.parameters / 1e6, unit="M"),
        figure(part, f"{label}: block weights removed", 100 * (1 - sizes[1] / sizes[0]), unit="%",
            op=">="),
        figure(part, f"{label}: step time", step_seconds(out) / 3600, unit="h",
            bar=bars.get("hours")),
        figure(part, f"{label}: step peak", step_peak(out) / 1e9, unit="GB"),
    ]  # fmt: skip
    if report.after.latency is not None:
        found.append(figure(part, f"{label}: prefill speed-up",
                         report.after.latency.prefill.speedup, unit="x", op=">="))  # fmt: skip
    before, after = (r.perplexity.perplexity for r in (report.before, report.after))
    return [*found, figure(part, f"{label}: {PERPLEXITY} / dense", after / before)]
