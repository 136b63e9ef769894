"""Results where they run: a module a part (``python -m compress.eval.bench.runtime``)."""
