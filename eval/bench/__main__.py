"""``python -m compress.eval.bench``: what there is to measure, and what it takes."""

from __future__ import annotations

BENCHMARKS = (
    # name, what, minutes on 2 cores, GB of disk
    ("quickstart", "the shipped quickstart recipe, to a model that runs", "7", "2"),
    ("peers", "quality, time and memory against llm-compressor", "30", "6"),
    ("memory", "7B- and 1.1B-shaped models within 2 GB of memory", "60", "45"),
    ("resume", "killed ten times, ten times the same bytes", "15", "0.1"),
    ("evaluation", "speed and agreement of perplexity against lm-eval", "5", "0.6"),
    ("speedup", "prefill speed-up of narrower and shallower models", "8", "1.5"),
    ("robust", "right on every machine: faults, families, memory, precision", "150", "45"),
    ("strangers", "twelve unknown model types, metrics, a wheel in an empty folder", "20", "6"),
    ("maskllm", "learned 2:4 masks, block by block and on the whole model", "200", "5"),
    ("depth", "fewer blocks: removed, flattened, fused, distilled", "240", "15"),
    ("dsformer", "dense-sparse factorisation against SVD-LLM at equal bytes", "240", "5"),
    ("vib", "learned widths against other ways to narrow a model", "240", "6"),
    ("masked", "masked generators: the digits demo, text, rxnfp", "60", "0.5"),
    ("masked_methods", "every method on masked generators of digits and MNIST", "90", "0.5"),
    ("masked_estimators", "estimators of a masked generator's likelihood", "5", "0.1"),
    ("runtime", "results in transformers, onnxruntime and llama.cpp", "70", "4"),
)


def main() -> None:
    from compress.system.tables import print_table

    print_table(
        "Benchmarks; each writes rows into a file of eval/results",
        ["command", "measures", "minutes, about", "GB of disk"],
        [[f"python -m compress.eval.bench.{name}", *rest] for name, *rest in BENCHMARKS],
        right=(2, 3),
    )
    print("--help has the options of each, --smoke tries one at a small size.")
    print("python -m compress.eval.bench.tables FILE ... puts the figures into documents.")


if __name__ == "__main__":
    main()
