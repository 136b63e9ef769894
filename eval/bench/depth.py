"""Fewer blocks: what removing, flattening and fusing 3, 6 and 9 of SmolLM2's 30 cost and give back.

SmolLM2-135M-Instruct in float32, calibrated with 128 x 512 tokens of WikiText-2 raw train, tested
on the first 32,768 tokens of its test split in windows of 1,024 (SLEB, which tries every block with
the head on top, with 16 x 512). Every run also times decode and prefill against the original, in
alternating pairs. Parts, each resumable:

    --only shortgpt | sleb | flatten | fuse
                     one method at the three sizes
    --only distilled flatten, then distill, by the shipped recipe
    --only ratios    between these, of 6 blocks
    --only choices   flatten of 6 blocks with other options than its defaults
    --only pair      the most similar pair side by side, no weight lost
    --only speed     6 blocks fewer: decode and prefill in 15 pairs; logits with a KV cache
    --only masked    a masked language model (rxnfp, a BERT of 12 blocks on USPTO-50k)
    --only precision what learns, in float32 and in bfloat16
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import yaml

from compress.eval.bench.masked_models import row
from compress.eval.bench.options import entry, parser, publish, results, say, work_folder
from compress.eval.bench.peer_material import MODEL, TEXT
from compress.eval.bench.provenance import DEFAULT
from compress.eval.bench.rows import Row, read_rows
from compress.eval.bench.runs import journal, run_once, step_peak, step_seconds, write_recipe
from compress.eval.cost.latency import paired_latency
from compress.eval.report import Report, load_report
from compress.models.sources.source import load_model, resolve
from compress.planning.recipe import read_recipe

COMMAND = "python -m compress.eval.bench.depth --only {}"
CODE = (
    *DEFAULT, "recipes/flattengpt", "recipes/fusegpt", ":!compress/generators",
    ":!compress/methods/quantize", ":!compress/methods/sparsity", ":!compress/methods/factorize",
    ":!compress/train/create", ":!compress/runtimes",
)  # fmt: skip
LABEL = "SmolLM2"
REMOVED = (6, 3, 9)  # the first one has the bars
METHODS = ("shortgpt", "sleb", "flatten", "fuse")
PARTS = (*METHODS, "distilled", "ratios", "choices", "pair", "speed", "masked", "precision")
SAMPLES = {"sleb": 16}  # a trial of each block, head and all: with 128 it takes an hour and a half
BARS = {
    ("flatten -6 blocks", "shortgpt -6 blocks"): 0.6,
    ("flatten -6 blocks", "sleb -6 blocks"): 1.0,
    ("fuse -6 blocks", "flatten -6 blocks"): 1.0,
    ("distilled -6 blocks", "dense"): 1.5,
}
BASE = {  # recipes without their options
    "flatten": "flattengpt/smollm2-20", "fuse": "fusegpt/smollm2-20",
    "distilled": "flattengpt/smollm2-20-distill",
}  # fmt: skip


def _base(arguments: Namespace, samples: int) -> dict[str, Any]:
    """Model, calibration and evaluation that all runs share."""
    smoke = arguments.smoke
    return {
        "model": MODEL, "seed": 0,
        "calibration": {"text": {**TEXT, "split": "train"}, "samples": 4 if smoke else samples,
                        "length": 64 if smoke else 512},
        "evaluation": {"text": {**TEXT, "split": "test"}, "window": 256 if smoke else 1024,
                       "max_tokens": 1024 if smoke else 32_768, "memory": False},
    }  # fmt: skip


def run(work: Path, name: str, steps: list[dict[str, Any]], arguments: Namespace) -> Path:
    """The folder of a run of these steps on SmolLM2."""
    samples = min(SAMPLES.get(step["method"], 128) for step in steps)
    path = write_recipe(work, name, **_base(arguments, samples), steps=steps)
    return run_once(work, name, path.read_text("utf-8"), arguments.data_root)


def report_of(out: Path) -> Report:
    return load_report(out / "report.json")


def perplexity(out: Path) -> float:
    return report_of(out).after.perplexity.perplexity


def steps_of(method: str, removed: int, arguments: Namespace) -> list[dict[str, Any]]:
    """Steps of a method; what has a shipped recipe is taken from there."""
    if method not in BASE:
        return [{"method": method, "remove": removed}]
    steps = yaml.safe_load(read_recipe(BASE[method]).to_yaml())["steps"]
    for step in steps:
        if "remove" in step or "share" in step:
            step.pop("share", None)
            step["remove"] = removed
        if arguments.smoke and step["method"] in ("fuse", "distill"):
            step["training"] = {**step.get("training", {}), "steps": 2}
    return steps


def _sizes(method: str, work: Path, arguments: Namespace) -> list[Row]:
    """One method at all sizes, published as each is measured."""
    rows: list[Row] = []
    for removed in (2,) if arguments.smoke else REMOVED:
        steps = steps_of(method, removed, arguments)
        out = run(work, f"{method}-{removed}", steps, arguments)
        rows += _line(method, f"{method} -{removed} blocks", out, removed)
        publish(arguments, work, rows, "depth", whole=False)
    return rows


def _line(part: str, thing: str, out: Path, removed: int, searched: bool = True) -> list[Row]:
    """A line of the table; without the step's cost where another run has done the search."""
    report, command, label = report_of(out), COMMAND.format(part), f"{LABEL}, {thing}"
    latency = report.after.latency
    rows = [
        row(command, f"{label}: perplexity", perplexity(out)),
        row(command, f"{label}: parameters", report.after.cost.size.parameters / 1e6, unit="M"),
        row(command, f"{label}: decode, ms a token", 1e3 * latency.decode.after, unit="ms"),
        row(command, f"{label}: decode speed-up", latency.decode.speedup, unit="x", op=">="),
    ]  # fmt: skip
    if searched:
        rows += [
            row(command, f"{label}: step time", step_seconds(out) / 60, unit="min",
                bar=6.0 if (part, removed) == ("flatten", 6) else None),
            row(command, f"{label}: step peak", step_peak(out) / 1e9, unit="GB",
                bar=3.0 if (part, removed) == ("flatten", 6) else None),
        ]  # fmt: skip
    if part == "shortgpt" and removed == REMOVED[0]:
        before = report.before
        rows += [
            row(command, f"{LABEL}, dense: perplexity", before.perplexity.perplexity),
            row(command, f"{LABEL}, dense: parameters", before.cost.size.parameters / 1e6,
                unit="M"),
            row(command, f"{LABEL}, dense: decode, ms a token", 1e3 * latency.decode.before,
                unit="ms"),
        ]  # fmt: skip
    return rows


def shortgpt(work: Path, arguments: Namespace) -> list[Row]:
    return _sizes("shortgpt", work, arguments)


def sleb(work: Path, arguments: Namespace) -> list[Row]:
    """One search to the largest size, which passes through the smaller ones on its way."""
    sizes = sorted((2,) if arguments.smoke else REMOVED, reverse=True)
    out = run(work, f"sleb-{sizes[0]}", steps_of("sleb", sizes[0], arguments), arguments)
    (found,) = [event for event in journal(out) if event["event"] == "step"]
    rows = _line("sleb", f"sleb -{sizes[0]} blocks", out, sizes[0])
    for removed in sizes[1:]:
        blocks = sorted(found["decision"]["order"][:removed])
        out = run(work, f"sleb-{removed}", [{"method": "drop_blocks", "blocks": blocks}], arguments)
        rows += _line("sleb", f"sleb -{removed} blocks", out, removed, searched=False)
        publish(arguments, work, rows, "depth", whole=False)
    return rows


def flatten(work: Path, arguments: Namespace) -> list[Row]:
    return _sizes("flatten", work, arguments)


def fuse(work: Path, arguments: Namespace) -> list[Row]:
    return _sizes("fuse", work, arguments)


def distilled(work: Path, arguments: Namespace) -> list[Row]:
    return _sizes("distilled", work, arguments)


def ratios(work: Path, arguments: Namespace) -> list[Row]:
    """The bars at 6 blocks, from the rows that the other parts have written."""
    measured = {row.figure: row.value for row in read_rows(results(arguments, work, "depth"))}
    found = []
    for (one, other), bar in BARS.items():
        values = [measured.get(f"{LABEL}, {thing}: perplexity") for thing in (one, other)]
        if None not in values:
            figure = f"{LABEL}: perplexity of {one}, over that of {other}"
            found.append(row(COMMAND.format("ratios"), figure, values[0] / values[1], bar=bar))
    return found


CHOICES = {
    "group 2": {"group": 2}, "ridge 10": {"ridge": 10.0},
    "no attention correction": {"attention_correction": False}, "no refit": {"refit": False},
}  # fmt: skip


def choices(work: Path, arguments: Namespace) -> list[Row]:
    """Flatten with one option changed at a time."""
    removed = 2 if arguments.smoke else REMOVED[0]
    (step,) = steps_of("flatten", removed, arguments)
    rows = []
    for name, change in CHOICES.items():
        slug = name.replace(" ", "-")
        out = run(work, f"choice-{slug}", [{**step, **change}], arguments)
        rows.append(
            row(COMMAND.format("choices"), f"{LABEL} flatten options, {name}: perplexity",
                perplexity(out))
        )  # fmt: skip
        publish(arguments, work, rows, "depth", whole=False)
    return rows


def pair(work: Path, arguments: Namespace) -> list[Row]:
    """Two blocks in one of twice the width, nothing fitted."""
    step = {"method": "flatten", "remove": 1, "restore_width": False, "refit": False}
    out = run(work, "pair", [step], arguments)
    report = report_of(out)
    ratio = report.after.perplexity.perplexity / report.before.perplexity.perplexity
    figure = f"{LABEL}, most similar pair side by side, width not restored: perplexity / dense"
    return [row(COMMAND.format("pair"), figure, ratio, bar=1.03)]


def speed(work: Path, arguments: Namespace) -> list[Row]:
    """Decode and prefill of 24 blocks against 30; and decoding returns what one forward does."""
    removed = 2 if arguments.smoke else REMOVED[0]
    out = run(work, f"flatten-{removed}", steps_of("flatten", removed, arguments), arguments)
    original = load_model(resolve(MODEL).folder, dtype=torch.float32)
    smaller = load_model(out / "model", dtype=torch.float32)
    say("15 pairs of prefill and decode")
    paired = paired_latency(original, smaller, repeats=3 if arguments.smoke else 15)
    command = COMMAND.format("speed")
    ids = torch.arange(100, 164)[None]
    with torch.no_grad():
        whole = smaller(ids).logits
        cache, steps = None, []
        for token in ids.split(1, dim=1):
            answer = smaller(token, past_key_values=cache, use_cache=True)
            cache = answer.past_key_values
            steps.append(answer.logits)
    difference = float((torch.cat(steps, 1) - whole).abs().max() / whole.abs().max())
    label = f"{LABEL}, flatten -6 blocks"
    return [
        row(command, f"{label}, paired: prefill speed-up", paired.prefill.speedup, unit="x",
            op=">=", bar=1.2),
        row(command, f"{label}, paired: decode speed-up", paired.decode.speedup, unit="x",
            op=">=", bar=1.2),
        row(command, f"{label}: logits with a KV cache, largest relative difference from one "
            "forward", difference, bar=1e-4),
    ]  # fmt: skip


def masked(work: Path, arguments: Namespace) -> list[Row]:
    """A BERT of chemical reactions: flatten refuses its post-norm blocks, the others take them."""
    rows: list[Row] = []
    text = {"source": "uspto50k"}
    few = arguments.smoke
    base = {
        "model": "pypi:rxnfp==0.1.0", "seed": 0,
        "calibration": {"text": {**text, "split": "validation"}, "samples": 16 if few else 256,
                        "length": 96, "batch": 8},
        "evaluation": {"text": {**text, "split": "test"}, "packing": "documents", "window": 96,
                       "max_tokens": 2048 if few else 16_384, "memory": False, "latency": False},
    }  # fmt: skip
    (fused,) = steps_of("fuse", 1, arguments)
    variants = {
        "shortgpt": [{"method": "shortgpt"}], "sleb": [{"method": "sleb"}], "fuse": [fused],
        "shortgpt and distill": [{"method": "shortgpt"}, {"method": "distill"}],
    }  # fmt: skip
    for removed in (1,) if few else (2, 4):
        for name, steps in variants.items():
            steps = [{**steps[0], "remove": removed}, *steps[1:]]
            slug = f"masked-{name.replace(' ', '-')}-{removed}"
            path = write_recipe(work, slug, **base, steps=steps)
            report = report_of(run_once(work, slug, path.read_text("utf-8"), arguments.data_root))
            rows += _masked_line(f"{name} -{removed} blocks", report.after)
            if not removed - (1 if few else 2) and name == "shortgpt":
                rows += _masked_line("dense", report.before)
            publish(arguments, work, rows, "depth", whole=False)
    return rows


def _masked_line(thing: str, result: Any) -> list[Row]:
    command, label = COMMAND.format("masked"), f"rxnfp, {thing}"
    found = result.masked
    return [
        row(command, f"{label}: masked cross entropy", found.cross_entropy, unit="nats"),
        row(command, f"{label}: masked accuracy", 100 * found.accuracy, unit="%", op=">="),
        row(command, f"{label}: parameters", result.cost.size.parameters / 1e6, unit="M"),
    ]


def precision(work: Path, arguments: Namespace) -> list[Row]:
    """Fuse with fewer blocks and steps, learned in each precision."""
    found: dict[str, list[float]] = {}
    (step,) = steps_of("fuse", 3, arguments)
    short = {**step.get("training", {}), "steps": 2 if arguments.smoke else 20}
    for kind in ("float32", "bfloat16"):
        fused = {**step, "training": {**short, "precision": kind}}
        out = run(work, f"precision-{kind}", [fused], arguments)
        found[kind] = [perplexity(out)]
    ratio = found["bfloat16"][0] / found["float32"][0]
    figure = f"{LABEL}, fuse -3 blocks, 20 steps: perplexity, learned in bfloat16 / in float32"
    return [row(COMMAND.format("precision"), figure, ratio)]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", choices=PARTS, action="append", help="default: all parts")
    options.add_argument("--data-root", type=Path, help="local copies of data sets (docs/data.md)")
    arguments = options.parse_args()
    work = work_folder(arguments, "depth")
    for part in arguments.only or PARTS:
        publish(arguments, work, globals()[part](work, arguments), "depth")


if __name__ == "__main__":
    entry(main)
