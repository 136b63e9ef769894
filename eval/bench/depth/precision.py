"""Fuse with fewer blocks and steps, learned in each precision from the same draws."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from compress.eval.bench.depth import FUSING, LABEL, SEEDS, figure
from compress.eval.bench.depth.sizes import perplexity, run, steps_of
from compress.eval.bench.rows import Row, over_seeds

CODE = FUSING


def measure(work: Path, arguments: Namespace) -> list[Row]:
    (step,) = steps_of("fuse", 3, arguments)
    short = {**step.get("training", {}), "steps": 2 if arguments.smoke else 20}
    ratios = []
    for seed in SEEDS[:2] if arguments.smoke else SEEDS:
        found = {}
        for kind in ("float32", "bfloat16"):
            fused = {**step, "training": {**short, "precision": kind}}
            name = f"precision-{kind}" + (f"-seed{seed}" if seed else "")
            found[kind] = perplexity(run(work, name, [fused], arguments, seed))
        ratios.append(found["bfloat16"] / found["float32"])
    name = f"{LABEL}, fuse -3 blocks, 20 steps: perplexity, learned in bfloat16 / in float32"
    return [figure("precision", name, **over_seeds(ratios))]
