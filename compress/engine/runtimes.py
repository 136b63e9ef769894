"""A result measured in other runtimes: exported, run there, timed in pairs.

Twice: against the original in transformers, which is what a user leaves behind, and against the
original in the same runtime. What the first shows beyond the second is the runtime's doing, not
that of the compression.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from compress.engine.exporting import export
from compress.engine.lab import Lab
from compress.eval.cost.latency import PairedLatency, paired_latency
from compress.eval.cost.memory import peak_memory
from compress.eval.spec import EvaluationSpec, RuntimeResult
from compress.models.kind import kind_of
from compress.models.positions import positions_of
from compress.models.sources.source import load_config
from compress.planning.evaluation_inputs import EvaluationInputs
from compress.runtimes.requirements import NAMES
from compress.system import memory
from compress.system.files import files_below

# What loads an export, from its place, the checkpoint and a number of tokens; another process does
# it too, so it is a name.
_LOADERS = {
    "onnx": "compress.runtimes.onnx.model:open_onnx",
    "gguf": "compress.runtimes.gguf.model:open_gguf",
}


def in_runtimes(
    folder: Path,
    inputs: EvaluationInputs,
    lab: Lab,
    *,
    original: Path | None = None,
    exported: Mapping[str, Path] | None = None,
    scratch: Path | None = None,
) -> tuple[RuntimeResult, ...]:
    """Measure a checkpoint in the runtimes that an evaluation names.

    Args:
        folder: the checkpoint.
        original: the checkpoint that it is timed against; without one nothing is timed.
        exported: format -> what was exported for it already; others are, to be removed again.
        scratch: folder for these; None for the system's.

    Raises:
        CompressError: a missing package, or what a runtime cannot run.
    """
    lab = replace(lab, device=torch.device("cpu"))
    found = []
    for name in inputs.spec.runtimes:
        lab.progress.say(f"measuring in {NAMES[name]}")
        with tempfile.TemporaryDirectory(prefix="compress-", dir=scratch) as created:
            shop = Path(created)
            place = (exported or {}).get(name) or _exported(name, folder, shop / "result", lab)
            own = original and _exported(name, original, shop / "original", lab, floats=True)
            found.append(_measured(name, place, folder, own, original, inputs, lab))
        memory.give_back()
    return tuple(found)


def place_of(to: str, folder: Path) -> Path:
    """Where what is exported to a format lies in a folder."""
    return folder / ("model.gguf" if to == "gguf" else to)


def _exported(name: str, folder: Path, shop: Path, lab: Lab, floats: bool = False) -> Path:
    shop.mkdir()
    place = place_of(name, shop)
    # Whether llama.cpp has the tokenizer's way of splitting text is of no matter here.
    options: dict[str, Any] = {"tokenizer": False} if name == "gguf" else {}
    if floats and name == "gguf":
        options["type"] = "F32"
    export(folder, name, place, trust_remote_code=lab.trust_remote_code, **options)  # pyrefly: ignore
    return place


def _measured(
    name: str,
    place: Path,
    folder: Path,
    own: Path | None,
    original: Path | None,
    inputs: EvaluationInputs,
    lab: Lab,
) -> RuntimeResult:
    spec = inputs.spec
    model = opened(name, place, folder, spec, lab.trust_remote_code)
    quality = spec.model_copy(
        update={"runtimes": (), "tasks": (), "latency": False, "memory": False}
    )
    result = lab.measure(model, replace(inputs, spec=quality))  # pyrefly: ignore
    figures: dict[str, Any] = {}
    if original is not None and inputs.paired:
        figures["latency"] = _timed(lab.load(original), model, spec)
        own_model = opened(name, own or place, original, spec, lab.trust_remote_code)
        figures["own_latency"] = _timed(own_model, model, spec)
    if spec.memory:
        figures["memory"] = peak_memory(
            place, loader=_LOADERS[name], checkpoint=folder,
            trust_remote_code=lab.trust_remote_code,
        )  # fmt: skip
    files = files_below(place) if place.is_dir() else [place]
    return RuntimeResult(
        runtime=name,  # pyrefly: ignore
        execution=model.execution,
        bytes=sum(file.stat().st_size for file in files),
        perplexity=result.perplexity,
        masked=result.masked,
        continuations=result.continuations,
        **figures,
    )


def opened(
    name: str, place: Path, folder: Path, spec: EvaluationSpec, trust_remote_code: bool
) -> Any:
    """What was exported, loaded in its runtime.

    Args:
        folder: of the checkpoint that it was made from.
        spec: of what it is to be asked: a cache in llama.cpp has a length.
    """
    module, _, function = _LOADERS[name].partition(":")
    limit = positions_of(load_config(folder, trust_remote_code=trust_remote_code))
    timed = spec.latency_spec()
    tokens = max(64, timed.prefill_tokens + timed.decode_tokens if timed else 0)
    tokens = min(tokens, limit) if limit else tokens
    load = getattr(importlib.import_module(module), function)
    return load(place, folder, tokens, trust_remote_code=trust_remote_code)


def _timed(before: PreTrainedModel | nn.Module, after: Any, spec: EvaluationSpec) -> PairedLatency:
    timed = spec.latency_spec()
    assert timed is not None
    timed = timed.within(positions_of(after.config), kind_of(after) == "causal")
    return paired_latency(before, after, **timed.model_dump())
