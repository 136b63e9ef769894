"""Does removing neurons and blocks make a model faster by what the arithmetic says?

Takes a quarter of the FFN neurons, or a fifth of the blocks, from SmolLM2-135M-Instruct and times
the prefill of 512 tokens against the original in alternating pairs. The prediction is the ratio of
the multiply-accumulates of exactly that prefill: the head once (only the last logits are computed),
attention over the positions that a token can see.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import Any

import torch

from compress.eval.bench.options import entry, parser, publish, say, work_folder
from compress.eval.bench.peer_material import MODEL, shortened
from compress.eval.bench.provenance import DEFAULT, NO_TRAINING
from compress.eval.bench.rows import Row
from compress.eval.bench.runs import run_measured, write_recipe
from compress.eval.cost.latency import paired_latency
from compress.eval.cost.macs import macs_per_token
from compress.models.sources.source import load_model, resolve

CODE = (*DEFAULT, *NO_TRAINING)
COMMAND = "python -m compress.eval.bench.speedup"


@dataclass(frozen=True)
class Case:
    label: str
    step: dict[str, Any]


CASES = {
    "width": Case("FFN width -25 %", {"method": "ffn_width", "share": 0.25}),
    "depth": Case("depth -20 %", {"method": "shortgpt", "share": 0.2}),
}


def prefill_macs(model: torch.nn.Module, tokens: int) -> int:
    """Multiply-accumulates of one causal forward of ``tokens`` tokens with the last logits only."""
    return macs_per_token(model, context=tokens).forward(tokens, logits=1, causal=True)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", choices=sorted(CASES), help="one case")
    options.add_argument("--repeats", type=int, default=15, help="pairs of forwards")
    options.add_argument("--tokens", type=int, default=512, help="length of the prefill")
    arguments = options.parse_args()
    work = work_folder(arguments, "speedup")
    source = shortened(resolve(MODEL).folder, work, 5 if arguments.smoke else None)
    original = load_model(source, dtype=torch.float32)
    before = prefill_macs(original, arguments.tokens)
    rows: list[Row] = []
    for name in [arguments.only] if arguments.only else list(CASES):
        case = CASES[name]
        recipe = write_recipe(
            work,
            name,
            model={"source": str(source)},
            calibration={
                "text": {"source": "python:pydoc_data.topics"}, "samples": 16, "length": 512,
            },
            steps=[case.step],
        )  # fmt: skip
        say(f"{case.label}: compressing")
        run = run_measured(recipe, work / name)
        smaller = load_model(run.model, dtype=torch.float32)
        say(f"{case.label}: {arguments.repeats} pairs")
        # One decoded token makes the prefill the one of a server: with a cache, last logits only.
        paired = paired_latency(
            original, smaller, prefill_tokens=arguments.tokens, decode_tokens=1,
            repeats=arguments.repeats,
        )  # fmt: skip
        predicted = before / prefill_macs(smaller, arguments.tokens)
        low, high = paired.prefill.interval
        measured = paired.prefill.speedup
        say(f"  measured {measured:.3f} ({low:.3f} to {high:.3f}), predicted {predicted:.3f}")
        command = f"{COMMAND} --only {name}"
        for what, value, unit, op, bar in (
            ("prefill speed-up", measured, "x", ">=", None),
            ("prefill speed-up predicted by MACs", predicted, "x", ">=", None),
            ("prefill speed-up, measured / predicted", measured / predicted, "", ">=", 0.9),
        ):
            rows.append(
                Row(
                    figure=f"{case.label}: {what}", value=value, unit=unit, op=op, bar=bar,
                    peer=None, command=command,
                )
            )  # fmt: skip
        del smaller
        shutil.rmtree(work / name, ignore_errors=True)
    publish(arguments, work, rows)


if __name__ == "__main__":
    entry(main)
