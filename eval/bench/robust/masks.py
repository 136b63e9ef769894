"""SmolLM2's 2:4 masks, learned block by block by the shipped recipe: three seeds.

Each run is resumable and shared with ``compress.eval.bench.maskllm --only smollm2``; a run of other
code, or of another recipe or text, is never taken.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from compress.eval.bench.mask_runs import FIRST, SEEDS, perplexities, shipped
from compress.eval.bench.masked_models import row
from compress.eval.bench.maskllm import CODE as CODE
from compress.eval.bench.options import work_folder
from compress.eval.bench.rows import Row, over_seeds
from compress.eval.bench.runs import step_peak, step_seconds

_LABEL = "SmolLM2 2:4 masks learned block by block, weights frozen"


def _row(figure: str, **more: Any) -> Row:
    value = more.pop("value")
    command = "python -m compress.eval.bench.robust --only masks"
    return row(command, f"{_LABEL}: {figure}", value, **more)


def measure(_work: Path, arguments: Namespace) -> list[Row]:
    """Perplexity of each seed, their median and range; time and memory."""
    work = work_folder(arguments, "maskllm")
    runs = {seed: shipped(work, FIRST, arguments, seed) for seed in SEEDS}
    found = {seed: perplexities(out)[1] for seed, out in runs.items()}
    middle = over_seeds(found.values())
    low, high = middle["range"]
    return [
        *(_row(f"perplexity, seed {seed}", value=value) for seed, value in found.items()),
        _row("perplexity", **middle, bar=53.0),
        _row("range of the seeds' perplexities over their median",
             value=100 * (high - low) / middle["value"], unit="%", bar=3.0),
        _row("peak memory", **over_seeds(step_peak(out) / 1e9 for out in runs.values()),
             unit="GB", bar=1.2),
        _row("time", **over_seeds(step_seconds(out) / 3600 for out in runs.values()), unit="h"),
    ]  # fmt: skip
