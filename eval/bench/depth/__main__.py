"""Fewer blocks: what removing, flattening and fusing 3, 6 and 9 of SmolLM2's 30 cost and give back.

    python -m compress.eval.bench.depth [--only PART ...] [--data-root DIR]

Each part is a module beside this one with a function ``measure(work, arguments)`` that returns
rows. Finished and interrupted runs are kept in the work folder, so a measurement goes on.
"""

from __future__ import annotations

from compress.eval.bench.options import entry
from compress.eval.bench.parts import measure_parts, parts_parser

PARTS = {
    "shortgpt": "blocks removed by how little they turn the hidden states: three sizes",
    "sleb": "blocks removed by the loss without them: three sizes",
    "flatten": "blocks put side by side: three sizes",
    "fuse": "blocks fused into their neighbours: three sizes, the first with three seeds",
    "distilled": "flatten, then distill, by the shipped recipe: as fuse",
    "adapters": "as distilled, with adapters that learn in place of the weights: 6 blocks",
    "ratios": "between these, of 6 blocks",
    "choices": "flatten of 6 blocks with other options than its defaults",
    "pair": "the most similar pair side by side, no weight lost",
    "speed": "6 blocks fewer: decode and prefill in 15 pairs; logits with a KV cache",
    "masked": "a masked language model (rxnfp, a BERT of 12 blocks on USPTO-50k)",
    "precision": "what learns, in float32 and in bfloat16: three seeds",
}


def main() -> None:
    measure_parts("depth", PARTS, parts_parser(__doc__, PARTS).parse_args())


if __name__ == "__main__":
    entry(main)
