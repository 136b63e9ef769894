"""Decode and prefill of 24 blocks against 30; and decoding returns what one forward does."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import torch

from compress.eval.bench.depth import FLATTENING, LABEL, figure
from compress.eval.bench.depth.sizes import removals, run, steps_of
from compress.eval.bench.options import say
from compress.eval.bench.peer_material import MODEL
from compress.eval.bench.rows import Row
from compress.eval.cost.latency import paired_latency
from compress.models.sources.source import load_model, resolve

CODE = FLATTENING


def measure(work: Path, arguments: Namespace) -> list[Row]:
    removed = removals(arguments)[0]
    out = run(work, f"flatten-{removed}", steps_of("flatten", removed, arguments), arguments)
    original = load_model(resolve(MODEL).folder, dtype=torch.float32)
    smaller = load_model(out / "model", dtype=torch.float32)
    say("15 pairs of prefill and decode")
    paired = paired_latency(original, smaller, repeats=3 if arguments.smoke else 15)
    label = f"{LABEL}, flatten -6 blocks"
    name = f"{label}: logits with a KV cache, largest relative difference from one forward"
    return [
        figure("speed", f"{label}, paired: prefill speed-up", paired.prefill.speedup, unit="x",
               op=">=", bar=1.2),
        figure("speed", f"{label}, paired: decode speed-up", paired.decode.speedup, unit="x",
               op=">=", bar=1.2),
        figure("speed", name, _cache_difference(smaller), bar=1e-4),
    ]  # fmt: skip


@torch.no_grad()
def _cache_difference(model: torch.nn.Module) -> float:
    """Of logits, token by token against all tokens at once, over the largest logit."""
    ids = torch.arange(100, 164)[None]
    whole = model(ids).logits
    cache, steps = None, []
    for token in ids.split(1, dim=1):
        answer = model(token, past_key_values=cache, use_cache=True)
        cache = answer.past_key_values
        steps.append(answer.logits)
    return float((torch.cat(steps, 1) - whole).abs().max() / whole.abs().max())
