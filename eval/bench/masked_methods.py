"""Every kind of method on one masked generator of images, each alone, as recipes without tuning.

--only digits   the model of masked/digits
--only mnist    the model of masked/mnist (needs --data-root; trains for half an hour first)

Pruning methods leave half of the block weights, so that they compare at equal bytes. (Checkpoints
store 2:4 zeros as zeros; a kernel's packed form adds 2 bits of position to each kept weight.)
"""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from compress.eval.bench.masked_models import STEPS, base_model, bound, on_base, row
from compress.eval.bench.options import entry, parser, publish, work_folder
from compress.eval.bench.provenance import DEFAULT
from compress.eval.bench.rows import Row

_COMMAND = "python -m compress.eval.bench.masked_methods --only {}"
CODE = (*DEFAULT, "recipes/masked")
_TITLES = {"digits": "digits", "mnist": "MNIST"}
_FEWER_SAMPLES = "evaluation.generator.samples=400"
_DENSE_BAR = {"mnist": 95.0}  # class accuracy of the dense model's samples, %


def _methods(blocks: int) -> dict[str, list[dict[str, Any]]]:
    return {
        "magnitude 2:4": [{"method": "magnitude", "pattern": "2:4"}],
        "Wanda 2:4": [{"method": "wanda", "pattern": "2:4"}],
        "SparseGPT 2:4": [{"method": "sparsegpt", "pattern": "2:4"}],
        "maskllm 2:4, block by block": [
            {"method": "maskllm", "pattern": "2:4", "training": {
                "steps": 100, "batch": 2, "learning_rate": 3e-3, "final_ratio": 0.1,
                "betas": [0.9, 0.95], "clip": None}},
        ],
        "FFN and head width -50 %": [
            {"method": "ffn_width", "share": 0.5}, {"method": "head_width", "share": 0.5},
        ],
        f"depth -{blocks // 2} blocks": [{"method": "shortgpt", "remove": blocks // 2}],
        "SVD-LLM 50 %": [{"method": "svd_llm", "ratio": 0.5}],
        "W8A8": [{"method": "w8a8"}],
        "GPTQ 4 bit": [{"method": "gptq", "bits": 4, "group_size": 32}],
    }  # fmt: skip


def table(part: str, work: Path, arguments: Namespace) -> list[Row]:
    """Rows of one model, published as soon as a method is measured."""
    base = base_model(work, part, arguments)
    blocks = json.loads((base / "config.json").read_text("utf-8"))["num_hidden_layers"]
    rows: list[Row] = []
    for name, steps in _methods(blocks).items():
        if arguments.smoke and steps[0]["method"] == "maskllm":
            steps[0]["training"] |= {"steps": 2}
        slug = "-".join(step["method"] for step in steps) + "-table"
        few = [] if arguments.smoke else [_FEWER_SAMPLES]
        report = on_base(work, part, slug, steps, arguments, *few)
        if not rows:
            rows += _of_model(part, "dense", report.before, report.before)
        rows += _of_model(part, name, report.after, report.before)
        publish(arguments, work, rows, "masked", whole=False)
    return rows


def _of_model(part: str, name: str, result: Any, dense: Any) -> list[Row]:
    """One line of the table: size, bound, class accuracy over the numbers of steps."""
    label, command = f"{_TITLES[part]}, {name}", _COMMAND.format(part)
    rows = [
        row(command, f"{label}: bound", bound(result), unit="nats"),
        row(command, f"{label}: bytes of block weights, dense / this",
            dense.cost.size.block_bytes / result.cost.size.block_bytes, op=">="),
        row(command, f"{label}: block weights that are not zero",
            100 * result.cost.size.nonzero_block_weights / dense.cost.size.block_weights,
            unit="%"),
    ]  # fmt: skip
    for point in result.generator.generation.points:
        bar = _DENSE_BAR.get(part) if name == "dense" and point.steps == STEPS else None
        figure = f"{label}: class accuracy, {point.steps} steps"
        accuracy = 100 * point.images.accuracy
        rows.append(row(command, figure, accuracy, unit="%", op=">=", bar=bar))
    return rows


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", choices=tuple(_TITLES), action="append", help="default: digits")
    options.add_argument("--data-root", type=Path, help="local copies of data sets (docs/data.md)")
    arguments = options.parse_args()
    work = work_folder(arguments, "masked")
    for part in arguments.only or ("digits",):
        publish(arguments, work, table(part, work, arguments), "masked")


if __name__ == "__main__":
    entry(main)
