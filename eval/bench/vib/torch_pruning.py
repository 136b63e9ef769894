"""Torch-Pruning's Taylor importance over all channels, heads and neurons, then the fine-tuning: in
an environment and a process of its own."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from compress.data.examples_spec import ExamplesSpec
from compress.data.labelled import load_rows, rows_digest
from compress.eval.bench.options import say
from compress.eval.bench.peer_environment import TORCH_PRUNING, peer_python
from compress.eval.bench.process import measure as measured_process
from compress.eval.bench.rows import Row
from compress.eval.bench.vib import SST2
from compress.eval.bench.vib.outcomes import Outcome
from compress.eval.bench.vib.sst2 import SHARES, base_model, curve, training
from compress.eval.quality.labels import label_scores
from compress.models.heads import head_of
from compress.models.inputs import Rows
from compress.models.sources.source import load_model, load_tokenizer
from compress.system.precision import fast_bfloat16
from compress.train.options import TrainingOptions

CODE = (*SST2, "eval/bench/vib/worker.py")
_SCORED = 1024  # examples for the importance
_WORKER = Path(__file__).with_name("worker.py")


def measure(work: Path, arguments: Namespace) -> list[Row]:
    python = peer_python(arguments.peer_python, TORCH_PRUNING)
    base, tuning = base_model(work, arguments), training(arguments)
    limit = 64 if arguments.smoke else None

    def measured(share: float, seed: int) -> Outcome:
        return _pruned(work, python, base, share, tuning, seed, arguments.data_root, limit)

    return curve("torch_pruning", SHARES, measured, work, arguments)


def _pruned(
    work: Path,
    python: Path,
    base: Path,
    share: float,
    training: TrainingOptions,
    seed: int,
    data_root: Path | None,
    limit: int | None = None,
) -> Outcome:
    """The outcome at one size; what was measured from the same model is taken as it is.

    Args:
        python: interpreter that has the tool. base: folder of the fine-tuned classifier.
        training: of the fine-tuning that follows.
        limit: examples at most, for smoke runs.
    """
    model = load_model(base, dtype=torch.float32)
    tokenizer, _ = load_tokenizer(base)
    train, test = (
        load_rows(
            ExamplesSpec.model_validate({"source": "sst2", "split": split, "limit": limit}),
            head_of(model), tokenizer, model.config, 64, data_root,
        )[1]
        for split in ("train", "validation")
    )  # fmt: skip
    rows = work / f"rows-{rows_digest(train)[:8]}-{rows_digest(test)[:8]}.safetensors"
    if not rows.exists():
        save_file({**_tensors("train", train), **_tensors("test", test)}, rows)
    job: dict[str, Any] = {
        "model": str(base), "rows": str(rows), "padding": model.config.pad_token_id,
        "share": share, "scored": min(_SCORED, len(train)), "steps": training.steps,
        "warmup": training.warmup, "batch": training.batch,
        "learning_rate": training.learning_rate, "seed": seed,
        "precision": "bfloat16" if fast_bfloat16(torch.device("cpu")) else "float32",
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    found = _found(work, python, job, f"torch-pruning-{round(100 * share)}-seed{seed}")
    right = _right(found["predictions"], test)
    dense = _right(label_scores(model, test).predictions, test)
    seconds = found["prune"] + found["fine_tune"]
    return Outcome(right, dense, found["before"], found["after"], seconds)


def _found(work: Path, python: Path, job: dict[str, Any], name: str) -> dict[str, Any]:
    """What the worker found, or has found for the same job."""
    path, done = work / f"{name}.job.json", work / f"{name}.json"
    text = json.dumps({**job, "out": str(done)}, indent=1)
    if not (done.exists() and path.exists() and path.read_text("utf-8") == text):
        done.unlink(missing_ok=True)
        path.write_text(text, encoding="utf-8")
        say(f"running {name}")
        measured_process([str(python), "-I", str(_WORKER), str(path)], work / f"{name}.log")
    return json.loads(done.read_text("utf-8"))


def _tensors(part: str, rows: Rows) -> dict[str, torch.Tensor]:
    found = {"ids": rows.ids.int(), "lengths": rows.lengths, "labels": rows.labels}
    return {f"{part}.{name}": tensor for name, tensor in found.items()}


def _right(predictions: list[float], rows: Rows) -> list[bool]:
    return [a == b for a, b in zip(predictions, rows.labels.tolist(), strict=True)]
