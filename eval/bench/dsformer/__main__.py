"""Dense-sparse factorisation (`dense_sparse`) against low rank at equal bytes.

    python -m compress.eval.bench.dsformer --data-root DIR [--only PART ...]

Each part is a module beside this one with a function ``measure(work, arguments)`` that returns
rows. What it has finished it keeps in the work folder, so an interrupted measurement goes on.
"""

from __future__ import annotations

from pathlib import Path

from compress.eval.bench.options import entry
from compress.eval.bench.parts import measure_parts, parts_parser

PARTS = {
    "layers": "every block linear of SmolLM2 at half the bytes: relative error of its outputs",
    "smollm2": "perplexity on WikiText-2 at 1.25 and 1.5 times smaller, without and with tuning",
    "size": "bytes of the checkpoints' linears against the formula, and prefill speed",
    "sst2": "MiniLM on SST-2: accuracy against bytes, STF and low rank that learn for as long",
    "curve": "the loss while supports learn, and while they stay, for as long",
}


def main() -> None:
    options = parts_parser(__doc__, PARTS)
    options.add_argument(
        "--base", type=Path, metavar="DIR",
        help="the MiniLM fine-tuned on SST-2 (default: fine-tuned here, for sst2 and curve)",
    )  # fmt: skip
    measure_parts("dsformer", PARTS, options.parse_args())


if __name__ == "__main__":
    entry(main)
