"""Dense-sparse factorisation (`dense_sparse`) against low rank at equal bytes.

    python -m compress.eval.bench.dsformer --data-root DIR [--only PART ...]

Each part is a module beside this one with a function ``measure(work, arguments)`` that returns
rows. What it has finished it keeps in the work folder, so an interrupted measurement goes on.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from compress.eval.bench.options import entry, parser, publish, say, work_folder

PARTS = {
    "layers": "every block linear of SmolLM2 at half the bytes: relative error of its outputs",
    "smollm2": "perplexity on WikiText-2 at 1.25 and 1.5 times smaller, without and with tuning",
    "size": "bytes of the checkpoints' linears against the formula, and prefill speed",
    "sst2": "MiniLM on SST-2: accuracy against bytes, STF and low rank that learn for as long",
    "curve": "the loss while supports learn, and while they stay, for as long",
}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", choices=list(PARTS), action="append", help="default: all")
    options.add_argument("--data-root", type=Path, help="local copies of data sets (docs/data.md)")
    options.add_argument(
        "--base", type=Path, metavar="DIR",
        help="the MiniLM fine-tuned on SST-2 (default: fine-tuned here, for sst2 and curve)",
    )  # fmt: skip
    arguments = options.parse_args()
    work = work_folder(arguments, "dsformer")
    for part in arguments.only or PARTS:
        say(f"part {part}: {PARTS[part]}")
        module = importlib.import_module(f"compress.eval.bench.dsformer.{part}")
        publish(arguments, work, module.measure(work, arguments), "dsformer")


if __name__ == "__main__":
    entry(main)
