"""A BERT of chemical reactions: flatten refuses its post-norm blocks, the others take them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.eval.bench import depth
from compress.eval.bench.depth import SEEDS, figure
from compress.eval.bench.depth.sizes import report_of, steps_of
from compress.eval.bench.options import publish
from compress.eval.bench.rows import Row, of_seeds
from compress.eval.bench.runs import run_once, write_recipe

CODE = (*depth.CODE, "recipes/fusegpt/smollm2-20.yaml", ":!compress/methods/depth/flatten")
_REMOVED = (2, 4)
_LEARNING = ("fuse", "distill")


def measure(work: Path, arguments: Namespace) -> list[Row]:
    """Masked cross entropy and accuracy with fewer blocks; what learns with three seeds."""
    rows: list[Row] = []
    (fused,) = steps_of("fuse", 1, arguments)
    variants = {
        "shortgpt": [{"method": "shortgpt"}], "sleb": [{"method": "sleb"}], "fuse": [fused],
        "shortgpt and distill": [{"method": "shortgpt"}, {"method": "distill"}],
    }  # fmt: skip
    for removed in (1,) if arguments.smoke else _REMOVED:
        for name, (first, *others) in variants.items():
            steps = [{**first, "remove": removed}, *others]
            learns = any(step["method"] in _LEARNING for step in steps)
            slug = f"masked-{name.replace(' ', '-')}-{removed}"
            reports = [
                report_of(_run(work, slug, steps, seed, arguments))
                for seed in (SEEDS if learns and not arguments.smoke else SEEDS[:1])
            ]
            rows += _line(f"{name} -{removed} blocks", [report.after for report in reports])
            if not any(row.figure.startswith("rxnfp, dense") for row in rows):
                rows += _line("dense", [reports[0].before])
            publish(arguments, work, rows, "depth", whole=False)
    return rows


def _run(
    work: Path, name: str, steps: list[dict[str, Any]], seed: int, arguments: Namespace
) -> Path:
    few, text = arguments.smoke, {"source": "uspto50k"}
    name += f"-seed{seed}" if seed else ""
    path = write_recipe(
        work, name, model="pypi:rxnfp==0.1.0", seed=seed,
        calibration={"text": {**text, "split": "validation"}, "samples": 16 if few else 256,
                     "length": 96, "batch": 8},
        evaluation={"text": {**text, "split": "test"}, "packing": "documents", "window": 96,
                    "max_tokens": 2048 if few else 16_384, "memory": False, "latency": False},
        steps=steps,
    )  # fmt: skip
    return run_once(work, name, path.read_text("utf-8"), arguments.data_root)


def _line(thing: str, results: Sequence[Any]) -> list[Row]:
    label, found = f"rxnfp, {thing}", [result.masked for result in results]
    return [
        figure("masked", f"{label}: masked cross entropy",
               **of_seeds([one.cross_entropy for one in found]), unit="nats"),
        figure("masked", f"{label}: masked accuracy",
               **of_seeds([100 * one.accuracy for one in found]), unit="%", op=">="),
        figure("masked", f"{label}: parameters", results[0].cost.size.parameters / 1e6, unit="M"),
    ]  # fmt: skip
