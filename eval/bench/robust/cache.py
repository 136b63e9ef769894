"""What a second run on one original saves: its quality is in the cache, the first run put it there.

SmolLM2-135M-Instruct, magnitude 2:4 (a step of seconds), 4,096 tokens of WikiText-2 raw test in
windows of 1,024; neither latency nor memory is measured, which no cache may save. Times are of
whole processes, in pairs: each pair starts with an empty cache of its own, and the models' files
have been read before, so that the disk favours neither run.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from statistics import median

import torch
from transformers import LlamaConfig

from compress.errors import CompressError
from compress.eval.bench.llama import write_llama
from compress.eval.bench.options import say
from compress.eval.bench.peer_material import MODEL, TEXT
from compress.eval.bench.provenance import DEFAULT, NO_TRAINING
from compress.eval.bench.rows import Row
from compress.eval.bench.runs import remembered, run_measured, write_recipe
from compress.eval.report import Report, load_report
from compress.models.identity import model_digest
from compress.models.sources.source import resolve

COMMAND = "python -m compress.eval.bench.robust --only cache"
CODE = (*DEFAULT, *NO_TRAINING)
PAIRS, PAIRS_SMOKE = 3, 1
_LABEL = "SmolLM2-135M, magnitude 2:4, 4,096 tokens"
_TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 512, "max_position_embeddings": 512,
}  # fmt: skip


def measure(work: Path, arguments: argparse.Namespace) -> list[Row]:
    """Rows of all pairs; a pair that is finished is kept in ``work`` until the rows are complete.

    Raises:
        CompressError: a second run that did not take its original's quality from the cache.
    """
    root = arguments.data_root
    root = root.expanduser().absolute() if root else None
    recipe = _recipe(work, arguments.smoke)
    found = [
        remembered(work / f"pair-{number}", lambda: _pair(recipe, work, root))
        for number in range(PAIRS_SMOKE if arguments.smoke else PAIRS)
    ]
    for path in work.glob("pair-*.json"):
        path.unlink()  # the rows are complete: the next call measures anew
    first, second = (median(pair[name] for pair in found) for name in ("first", "second"))
    worst = max(pair["difference"] for pair in found)
    return [
        _row("time of the first run", first, "s"),
        _row("time of a second run with the original's quality cached", second, "s"),
        _row("time of a second run / the first", second / first, bar=1.0),
        _row("perplexity of the original, cached - measured", worst, bar=0.0),
    ]


def _recipe(work: Path, smoke: bool) -> Path:
    section = {"latency": False, "memory": False}
    if smoke:
        config = LlamaConfig(**_TINY, tie_word_embeddings=False)
        model = write_llama(work / "tiny", config, torch.float32)
        text, size = {"source": "python:pydoc_data.topics"}, {"max_tokens": 1024, "window": 128}
    else:
        model = resolve(MODEL).folder
        text, size = {**TEXT, "split": "test"}, {"max_tokens": 4096, "window": 1024}
    model_digest(model)  # reads every file once
    return write_recipe(
        work, "cache", model={"source": str(model)},
        steps=[{"method": "magnitude", "pattern": "2:4"}],
        evaluation={"text": text, **size, **section},
    )  # fmt: skip


def _pair(recipe: Path, work: Path, root: Path | None) -> dict[str, float]:
    """Seconds of two runs that share a cache, and how far the original's perplexities differ."""
    cache = work / "figures"
    shutil.rmtree(cache, ignore_errors=True)
    seconds: dict[str, float] = {}
    reports: dict[str, Report] = {}
    for name in ("first", "second"):
        run = run_measured(recipe, work / name, root, cache_dir=cache)
        seconds[name], reports[name] = run.usage.seconds, load_report(run.folder)
        say(f"  {name}: {seconds[name]:.1f} s")
        shutil.rmtree(run.folder, ignore_errors=True)
    shutil.rmtree(cache, ignore_errors=True)
    first, second = (reports[name].before for name in ("first", "second"))
    if first.cached or "perplexity" not in second.cached:
        raise CompressError(
            "the second run, and it alone, to take its original's perplexity from the cache",
            f"{first.cached} in the first and {second.cached} in the second",
            "Measure again while nobody edits the code",
        )  # fmt: skip
    difference = abs(first.perplexity.perplexity - second.perplexity.perplexity)
    return {**seconds, "difference": difference}


def _row(figure: str, value: float, unit: str = "", bar: float | None = None) -> Row:
    return Row(
        figure=f"{_LABEL}: {figure}", value=value, unit=unit, op="<=", bar=bar, peer=None,
        command=COMMAND,
    )  # fmt: skip
