"""Bytes of the layers in the checkpoints of part `smollm2` against the formula, and prefill of a
layer against the plain linear's."""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path
from statistics import median

import torch
from torch import nn

from compress.checkpoint.state import ModelState
from compress.eval.bench import dsformer
from compress.eval.bench.dsformer import LEARNING, figure
from compress.eval.bench.dsformer.smollm2 import RATIOS, run
from compress.eval.bench.rows import Row
from compress.linear.dense_sparse import DenseSparseLinear, stored_bytes
from compress.linear.layer import Layer
from compress.methods.factorize.dense_sparse import DenseSparseMethod
from compress.models.sources.source import load_config
from compress.system.tensors import TensorIndex

CODE = (*dsformer.CODE, *LEARNING, "recipes/dsformer/smollm2*", "eval/bench/dsformer/smollm2.py")
_SHAPES = ((576, 576), (192, 576), (1536, 576), (576, 1536))
_PAIRS = 200


def measure(work: Path, arguments: Namespace) -> list[Row]:
    rows = []
    for ratio in RATIOS:
        folder = run(work, ratio, "plain", arguments) / "model"
        said, on_disk, plain = _bytes(folder)
        label = f"SmolLM2, block linears {ratio} x smaller"
        rows += [
            figure("size", f"{label}: bytes on disk, relative difference from the formula",
                   abs(on_disk / said - 1), bar=0.01),
            figure("size", f"{label}: plain bytes / bytes on disk", plain / on_disk, op=">="),
        ]  # fmt: skip
    times = [_prefill(*shape) for shape in _SHAPES]
    label = "prefill of 512 tokens, median over pairs, worst shape of SmolLM2"
    rows += [
        figure("size", f"dense_sparse, {label}: time / plain linear",
               max(layer for layer, _ in times), bar=1.1),
        figure("size", f"another plain linear, {label}: time / plain linear",
               max(other for _, other in times)),
    ]  # fmt: skip
    return rows


def _bytes(folder: Path) -> tuple[int, int, int]:
    """Of all layers of a checkpoint: by the formula, as stored, and of the plain linears."""
    index = TensorIndex.open(folder)
    state = ModelState.of_checkpoint(index, load_config(folder))
    model = state.streamed().model
    said = on_disk = plain = 0
    stored = {name: index.entry(name).nbytes for name in index.names()}
    for name, layer in model.named_modules():
        if isinstance(layer, DenseSparseLinear):
            shape = layer.out_features, layer.in_features
            width = index.dtype(f"{name}.values.weight").itemsize
            said += stored_bytes(*shape, layer.blocks, layer.rank, layer.nonzeros, width)
            plain += width * shape[0] * shape[1]
            own = (n for n in stored if n.startswith(f"{name}.") and n != f"{name}.bias")
            on_disk += sum(stored[n] for n in own)
    return said, on_disk, plain


@torch.no_grad()
def _prefill(out_features: int, in_features: int) -> tuple[float, float]:
    """Time of a layer, and of a second plain linear, over that of a plain linear.

    Each is compared with the linear that ran beside it, in turn before and after it, and the median
    of these quotients counts: what else a machine does meanwhile, which may take three times as
    long, then meets both alike. The second linear shows what is left of it.
    """
    form = DenseSparseMethod(ratio=0.8).form(out_features, in_features, 4)
    assert form is not None
    shape = in_features, out_features
    layer: Layer = DenseSparseLinear(*shape, form.blocks, form.rank, form.nonzeros, bias=False)
    layer.eval().serving = True
    linear, other = (nn.Linear(*shape, bias=False) for _ in range(2))
    inputs = torch.randn(512, in_features)
    found = []
    for module in (layer, other):
        module(inputs)  # what it keeps is made here
        quotients = []
        for pair in range(_PAIRS):
            taken = {}
            for each in (module, linear) if pair % 2 else (linear, module):
                start = time.perf_counter()
                each(inputs)
                taken[each] = time.perf_counter() - start
            quotients.append(taken[module] / taken[linear])
        found.append(median(quotients))
    return found[0], found[1]
