"""A small mixture of experts, trained here: are statistics of an expert's own tokens worth it?

The same methods run once with what was routed to each expert and once with the statistics of all
experts of a layer added up, which is what a method that knows nothing of routing would have.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compress
from compress.engine import blocks
from compress.errors import CompressError
from compress.eval.bench.options import say
from compress.eval.bench.provenance import ROOT
from compress.eval.bench.rows import Row
from compress.linear.statistics import InputStatistics
from compress.models.experts import unfused_in

COMMAND = "python -m compress.eval.bench.strangers --only mixture"
ARCHITECTURE = {
    "model_type": "mixtral", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8,
    "num_experts_per_tok": 2, "max_position_embeddings": 128, "sliding_window": None,
}  # fmt: skip
ONLY = {"include": ["*.experts.*"]}
STEPS: dict[str, dict[str, Any]] = {
    "wanda 2:4": {"method": "wanda", "pattern": "2:4", **ONLY},
    "sparsegpt 2:4": {"method": "sparsegpt", "pattern": "2:4", **ONLY},
    "gptq 2 bits": {"method": "gptq", "bits": 2, "group_size": 32, **ONLY},
}
# Which experts go, by what `drop_experts` may rank them by.
IMPORTANCES = ("mean", "sum", "tokens")


def mixture(work: Path, smoke: bool) -> list[Row]:
    """Perplexity by an expert's own statistics over that by pooled ones, and with fewer experts;
    memory beside the plan."""
    text = work / "text.txt"
    pages = sorted((ROOT / "docs").glob("*.md"))  # a text that any checkout has
    text.write_text("\n".join(page.read_text(encoding="utf-8") for page in pages))
    run = compress.run(_recipe(text, 20 if smoke else 400, []), work / "trained")
    base = run.folder / "base"
    evaluation = _recipe(text, 1, [])["evaluation"]
    dense = run.report.after.perplexity.perplexity
    say(f"dense: {dense:.3f}")
    rows, within = [_row("dense: perplexity", dense)], 0.0
    for name, step in STEPS.items():
        found = {}
        for how, context in (("own", contextlib.nullcontext), ("pooled", _pooled)):
            folder = work / f"{name}-{how}".replace(" ", "-").replace(":", "-")
            shutil.rmtree(folder, ignore_errors=True)
            recipe = {**_recipe(text, 1, [step]), "model": str(base), "evaluation": evaluation}
            with context():
                found[how] = compress.run(recipe, folder).report.after.perplexity.perplexity
            lines = (folder / "journal.jsonl").read_text(encoding="utf-8").splitlines()
            event = next(e for e in map(json.loads, lines) if e["event"] == "step")
            within = max(within, event["peak_bytes"] / event["planned_bytes"])
        say(f"{name}: {found}")
        rows.append(_row(f"{name}: perplexity, own / pooled statistics",
                         found["own"] / found["pooled"], bar=1.0))  # fmt: skip
        rows.append(_row(f"{name}: perplexity", found["own"]))
    for importance in IMPORTANCES:
        step = {"method": "drop_experts", "keep": 6, "importance": importance}
        folder = work / f"drop-experts-{importance}"
        shutil.rmtree(folder, ignore_errors=True)
        recipe = {**_recipe(text, 1, [step]), "model": str(base), "evaluation": evaluation}
        left = compress.run(recipe, folder).report.after.perplexity.perplexity
        rows.append(_row(f"6 of 8 experts by {importance}: perplexity", left))
    return [*rows, _row("largest peak memory of a step, measured / planned", within, bar=1.0)]


def _recipe(text: Path, steps: int, done: list[dict[str, Any]]) -> dict[str, Any]:
    read = {"source": str(text), "part": "head:0.8"}
    return {
        "name": "mixture",
        "device": "cpu",
        "model": {
            "train": {
                "architecture": ARCHITECTURE, "tokenizer": {"kind": "bytes"}, "text": read,
                "length": 64, "training": {"steps": steps, "batch": 16, "learning_rate": 0.003},
            }
        },
        "calibration": {"text": read, "samples": 64, "length": 64},
        "steps": done,
        "evaluation": {
            "text": {"source": str(text), "part": "tail:0.2"}, "window": 64, "max_tokens": 16384,
            "latency": False, "memory": False, "continuations": 0,
        },
    }  # fmt: skip


@contextlib.contextmanager
def _pooled() -> Iterator[None]:
    """Let every expert of a layer have the statistics of all of them."""
    own = blocks.collected

    def collected(kind: str, block: Any, site: Any, names: Any, replay: Any, device: Any) -> Any:
        found = own(kind, block, site, names, replay, device)
        for path, _ in unfused_in(block):
            for tensor in ("gate_up_proj", "down_proj"):
                members = [n for n in found if n.startswith(f"{path}.") and n.endswith(tensor)]
                if members:
                    found |= dict.fromkeys(members, _sum([found[n] for n in members]))
        return found

    blocks.collected = collected
    try:
        yield
    finally:
        blocks.collected = own


def _sum(parts: list[InputStatistics]) -> InputStatistics:
    """Statistics of all inputs of several."""
    first = parts[0]
    total = InputStatistics(first.width, first.kind)
    for part in parts:
        total.count += part.count
        for name in ("_gram", "_square", "_absolute"):
            held, more = getattr(total, name), getattr(part, name)
            if (held is None) != (more is None):
                raise CompressError("statistics of one kind", name)
            if held is not None:
                held += more
    return total


def _row(figure: str, value: float, bar: float | None = None) -> Row:
    return Row(
        figure=f"strangers: trained mixture of 8 experts, {figure}", value=value, unit="", op="<=",
        bar=bar, peer=None, command=COMMAND,
    )  # fmt: skip
