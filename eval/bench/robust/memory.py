"""Peaks and times against what was promised.

The large models are those of compress.eval.bench.memory. Every method then takes a llama with three
blocks of 38 MB (float32) through a run in a process of its own; its step's peak of resident memory
and its time, as the journal has them, are divided by what the same run's plan said.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from compress.eval.bench.llama import write_llama
from compress.eval.bench.memory import CASES, LIMIT, run_case
from compress.eval.bench.options import publish, say
from compress.eval.bench.provenance import RUN
from compress.eval.bench.rows import Row
from compress.eval.bench.runs import journal, remembered, run_measured, write_recipe
from compress.methods.catalog import BUILT_IN

COMMAND = "python -m compress.eval.bench.robust --only memory"
CODE = (*RUN, ":!compress/train/create")  # plans, too
MIDDLE = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 3,
    "num_attention_heads": 12, "num_key_value_heads": 12, "vocab_size": 8000,
    "max_position_embeddings": 512,
}  # fmt: skip
SMOKE = {**MIDDLE, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
         "num_key_value_heads": 4, "num_hidden_layers": 2, "vocab_size": 1000}  # fmt: skip
_DEPTH, _WIDTH, _RANK = {"remove": 1}, {"share": 0.25}, {"ratio": 0.5}
_CODED = {**_RANK, "rounds": 2}  # minutes with as many as by default; a round is like another
_TRAINING = {"training": {"steps": 20, "batch": 1}}
OPTIONS: dict[str, dict[str, Any]] = {
    "shortgpt": _DEPTH, "sleb": _DEPTH, "drop_blocks": {"blocks": [1]},
    "flatten": _DEPTH, "fuse": {**_DEPTH, **_TRAINING},
    "ffn_width": _WIDTH, "head_width": _WIDTH, "vib": {**_WIDTH, **_TRAINING}, "svd": _RANK,
    "asvd": _RANK, "svd_llm": _RANK, "fwsvd": _RANK, "drone": _RANK,
    "dense_sparse": _CODED, "stf": _TRAINING, "maskllm": _TRAINING, "distill": _TRAINING,
}  # fmt: skip
BEFORE = {  # steps that a method needs in front
    "distill": [{"method": "magnitude", "pattern": "2:4"}],
    "stf": [{"method": "dense_sparse", **_CODED}],
}


def measure(work: Path, arguments: argparse.Namespace) -> list[Row]:
    """Rows of the large models and of every method."""
    rows: list[Row] = []

    def note(*figures: Row) -> None:
        """Rows, published at once: the part takes an hour."""
        rows.extend(figures)
        publish(arguments, work, figures, "robust", whole=False)

    for name, case in CASES.items():
        peak = remembered(
            work / name,
            lambda name=name: {"peak": run_case(name, work, arguments.smoke).usage.peak_bytes},
        )["peak"]
        note(_row(f"{case.label}: peak memory", peak / 1e9, "GB", LIMIT))
    shape = SMOKE if arguments.smoke else MIDDLE
    config = LlamaConfig(**shape, tie_word_embeddings=False)
    model = write_llama(work / f"llama-{shape['hidden_size']}", config, torch.bfloat16)
    samples = 4 if arguments.smoke else 16
    for name in sorted(BUILT_IN.keys() - {"drop_experts"}):  # a llama has none
        found = remembered(
            work / f"method-{name}", lambda name=name: _step(name, model, work, samples)
        )
        peak = found["peak_bytes"] / found["planned_bytes"]
        # Nobody waits for tenths of a second: what takes less than one counts as one.
        time = max(1.0, found["seconds"]) / max(1.0, found["planned_seconds"])
        note(
            _row(f"{name}: peak / plan", peak, "", 1.1),
            _row(f"{name}: time / plan, or plan / time", max(time, 1 / time), "", 1.5),
        )
    for path in work.glob("*.json"):
        path.unlink()  # the rows are complete: the next call measures anew
    return rows


def _step(name: str, model: Path, work: Path, samples: int) -> dict[str, Any]:
    """The journal's line on a step of one method."""
    say(f"{name}: a run of its own")
    recipe = write_recipe(
        work, name, model={"source": str(model)},
        steps=[*BEFORE.get(name, []), {"method": name, **OPTIONS.get(name, {})}],
        calibration={
            "text": {"source": "python:pydoc_data.topics"}, "samples": samples, "length": 256,
        },
    )  # fmt: skip
    out = work / name
    run_measured(recipe, out)
    event = [e for e in journal(out) if e["event"] == "step"][-1]
    shutil.rmtree(out, ignore_errors=True)
    say(
        f"  peak {event['peak_bytes'] / 1e9:.3f} GB of {event['planned_bytes'] / 1e9:.3f}, "
        f"{event['seconds']:.1f} s of {event['planned_seconds']:.1f}"
    )
    return event


def _row(figure: str, value: float, unit: str, bar: float) -> Row:
    return Row(figure=figure, value=value, unit=unit, op="<=", bar=bar, peer=None, command=COMMAND)
