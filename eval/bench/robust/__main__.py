"""Whether the toolkit is right everywhere: a part a bar, rows into eval/results/robust.json.

    python -m compress.eval.bench.robust --data-root DIR --attack DIR [--only PART ...]

Each part is a module beside this one with a function ``measure(work, arguments)`` that returns
rows; what it has finished it keeps in the work folder, so an interrupted measurement goes on.
"""

from __future__ import annotations

from pathlib import Path

from compress.eval.bench.options import entry
from compress.eval.bench.parts import measure_parts, parts_parser

PARTS = {
    "suite": "the test suite in float32 and in bfloat16",
    "attack": "bad inputs and faults, by a folder of cases that --attack names",
    "masks": "SmolLM2's learned 2:4 masks, three seeds",
    "memory": "peaks of large models and of every method, beside what was planned",
    "tokens": "perplexity and accuracy with the tokens that a tokenizer adds",
    "families": "24 families: run, save, load in a fresh process, equal logits",
    "compute": "one-shot methods in float32 and bfloat16 beside another tool",
    "cache": "a second run on one original, whose evaluation is in the cache, beside the first",
}


def main() -> None:
    options = parts_parser(__doc__, PARTS)
    options.add_argument("--attack", type=Path, help="folder of the cases of the part `attack`")
    measure_parts("robust", PARTS, options.parse_args(), apart=True)


if __name__ == "__main__":
    entry(main)
