"""Learned widths (`vib`) against magnitude, the project's own width steps, and Torch-Pruning.

    python -m compress.eval.bench.vib --data-root DIR [--only PART ...]

Each part is a module beside this one with a function ``measure(work, arguments)`` that returns
rows. Finished and interrupted runs are kept in the work folder, so a measurement goes on.
"""

from __future__ import annotations

from pathlib import Path

from compress.eval.bench.options import entry
from compress.eval.bench.parts import measure_parts, parts_parser

PARTS = {
    "fine_tune": "MiniLM fine-tuned on SST-2, which all others on SST-2 begin with",
    "full": "weights and gates learn, by the shipped recipe: 50, 30, 70 % of all parameters gone",
    "fast": "the same from a share of the data",
    "faster": "no weight learns but in a short fine-tuning",
    "magnitude": "`ffn_width` and `head_width` by magnitude, nothing fitted: 20, 30, 40 %",
    "width": "`ffn_width` and `head_width` as they are",
    "torch_pruning": "Taylor importance, in an environment of its own",
    "ratios": "the bars on SST-2, from the rows that the other parts have written",
    "speed": "prefill of `full` at 50 % in 15 pairs",
    "smollm2_gates": "a fifth of SmolLM2's block parameters gone, by the shipped recipe",
    "smollm2_widths": "`head_width` and `ffn_width` to the same size",
    "smollm2_ratios": "between these two",
    "smollm2_distilled": "the shipped recipe that goes on with `distill`",
}


def main() -> None:
    options = parts_parser(__doc__, PARTS)
    options.add_argument("--base", type=Path, metavar="DIR",
                         help="a fine-tuned model of an earlier run, to begin with")  # fmt: skip
    options.add_argument("--share", type=float, action="append", help="only these sizes, on SST-2")
    options.add_argument("--seeds", type=int, default=1,
                         help="of each method on SST-2 (default: 1)")  # fmt: skip
    options.add_argument("--peer-python", type=Path, metavar="PATH",
                         help="interpreter that has Torch-Pruning")  # fmt: skip
    measure_parts("vib", PARTS, options.parse_args())


if __name__ == "__main__":
    entry(main)
