"""The parts of an evaluation: what each is measured with, and which are known already."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pydantic import BaseModel
from torch import LongTensor, nn

from compress.data.framing import Frame, Kind, frame_for
from compress.data.labelled import rows_digest
from compress.eval.cache import Figures
from compress.eval.quality.continuations import continuations
from compress.eval.quality.denoising import Sequences
from compress.eval.quality.generation import Judges
from compress.eval.quality.generator import GeneratorResult, evaluate_generator, sampler_options
from compress.eval.quality.labels import LabelsResult, label_scores
from compress.eval.quality.masked import MaskedResult, masked_scores
from compress.eval.quality.perplexity import PerplexityResult, perplexity
from compress.eval.quality.tasks import TasksResult, run_tasks, task_data
from compress.eval.spec import EvaluationSpec
from compress.generators.description import MaskedGeneration
from compress.models.inputs import ImageRows, Rows
from compress.models.positions import positions_of

Progress = Callable[[str, int, int], None]


class Parts:
    """The parts of one evaluation, each measured or, where its figures are known, recalled."""

    def __init__(self, model: nn.Module, figures: Figures | None) -> None:
        self.figures = figures
        self.found: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self.cached: dict[str, str] = {}
        # What decides figures beside each part's own options.
        self._computed = {
            "dtype": str(model.dtype),
            "device": _device(model.device),
            "float32 products": torch.get_float32_matmul_precision(),
        }

    def measure(self, part: str, function: Callable[[], Any]) -> None:
        """A part whose figures are of this moment."""
        start = time.perf_counter()
        self.found[part] = function()
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start

    def quality(
        self,
        part: str,
        kind: type[BaseModel],
        protocol: dict[str, Any] | None,
        function: Callable[[], Any],
    ) -> None:
        """A part whose figures follow from checkpoint, protocol and code.

        Args:
            protocol: everything that ``function`` is given, as plain data; None where something
                decides the figures that no digest tells.
        """
        if protocol is None or self.figures is None:
            return self.measure(part, function)
        protocol = {**protocol, "computed": self._computed}
        known = self.figures.recall(part, protocol, kind)
        if known is None:
            self.measure(part, function)
            self.figures.keep(part, protocol, self.found[part], self.seconds[part])
        else:
            self.found[part], self.cached[part], self.seconds[part] = known
        return None


def _device(device: torch.device) -> str:
    """What computes: figures of two kinds of accelerators may differ beyond rounding."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def perplexity_part(
    parts: Parts,
    model: nn.Module,
    tokenizer: Any,
    spec: EvaluationSpec,
    tokens: LongTensor,
    bytes_count: int | None,
    progress: Progress | None,
) -> None:
    frame = _frame(model, tokenizer, spec, "causal")
    # The last token of a window is not run: one special token fits beside as many as there are.
    longest = _positions(model) - max(0, len(frame.prefix) - 1)
    window = spec.window or min(1024, longest)
    options = {
        "prefix": frame.prefix, "window": window, "stride": spec.stride or window,
        "batch_size": spec.batch_size, "bytes_count": bytes_count,
    }  # fmt: skip
    told = _named("perplexity", progress)
    parts.quality(
        "perplexity", PerplexityResult, {"tokens": ids_digest(tokens), **options},
        lambda: perplexity(model, tokens, progress=told, **options),
    )  # fmt: skip


def continuations_part(
    parts: Parts, model: nn.Module, tokenizer: Any, spec: EvaluationSpec, tokens: LongTensor
) -> None:
    prefix = _frame(model, tokenizer, spec, "causal").prefix
    parts.measure(
        "continuations",
        lambda: continuations(model, tokenizer, tokens, spec.continuations, tuple(prefix)),
    )


def masked_part(
    parts: Parts,
    model: nn.Module,
    tokenizer: Any,
    spec: EvaluationSpec,
    tokens: LongTensor | Sequence[LongTensor],
    progress: Progress | None,
) -> None:
    frame = _frame(model, tokenizer, spec, "masked")
    options = {
        "mask_token_id": tokenizer.mask_token_id, "prefix": frame.prefix, "suffix": frame.suffix,
        "window": masked_window(model.config, spec), "batch_size": max(spec.batch_size, 8),
        **spec.masked.model_dump(),
    }  # fmt: skip
    documents = not isinstance(tokens, torch.Tensor)
    read = ids_digest(joined(tokens) if documents else tokens)
    told = _named("masked", progress)
    parts.quality(
        "masked", MaskedResult, {"tokens": read, "documents": documents, **options},
        lambda: masked_scores(model, tokens, progress=told, **options),
    )  # fmt: skip


def generator_part(
    parts: Parts,
    model: nn.Module,
    spec: EvaluationSpec,
    description: MaskedGeneration,
    data: Sequences | None,
    judges: Judges,
    baseline: nn.Module | None,
    progress: Progress | None,
) -> None:
    """Scores, which follow from the data, and samples, whose time is a figure of its own."""
    asked = spec.generator
    length = spec.window or window_of(model, description)
    if asked.samples:
        sampler_options(asked, description.length or length)  # refused before anything is scored
    batch = max(spec.batch_size, 16)
    scores = asked.model_copy(update={"samples": 0})

    def scored() -> GeneratorResult:
        return evaluate_generator(
            model, description, scores, data=data, length=length, original=baseline,
            batch_size=batch, progress=progress,
        )  # fmt: skip

    protocol = None
    if data is not None and baseline is None:
        drawn = {"samples", "steps", "sampler", "scorer"}
        protocol = {
            "tokens": [ids_digest(x) for x in (data.tokens, data.free, data.sizes)],
            "bytes_per_token": data.bytes_per_token, "batch_size": batch,
            "description": description.model_dump(mode="json"),
            **asked.model_dump(mode="json", exclude=drawn),
        }  # fmt: skip
    parts.quality("generator", GeneratorResult, protocol, scored)
    known = parts.found["generator"]
    parts.measure(
        "generator",
        lambda: evaluate_generator(
            model, description, asked, length=length, judges=judges, batch_size=batch,
            known=known, progress=progress,
        ),
    )  # fmt: skip


def labels_part(
    parts: Parts,
    model: nn.Module,
    spec: EvaluationSpec,
    rows: Rows | ImageRows,
    progress: Progress | None,
) -> None:
    batch = max(spec.batch_size, 32)
    told = _named("labels", progress)
    parts.quality(
        "labels", LabelsResult, {"examples": rows_digest(rows), "batch_size": batch},
        lambda: label_scores(model, rows, batch_size=batch, progress=told),
    )  # fmt: skip


def tasks_part(
    parts: Parts, model: nn.Module, tokenizer: Any, spec: EvaluationSpec, data_root: Any
) -> None:
    options = {
        "limit": spec.limit, "num_fewshot": spec.num_fewshot, "batch_size": spec.batch_size,
        "special_tokens": spec.special_tokens,
    }  # fmt: skip
    data = None if spec.include_path else task_data(spec.tasks, data_root)
    masked = spec.masked_tasks
    # The tokenizer that texts are read with is one of the checkpoint's files.
    protocol = {"data": data, "masked": masked.model_dump(), **options} if data else None
    parts.quality(
        "tasks", TasksResult, protocol,
        lambda: run_tasks(
            model, tokenizer, spec.tasks, include_path=spec.include_path, data_root=data_root,
            masked=masked, **options,
        ),
    )  # fmt: skip


def window_of(model: nn.Module, description: MaskedGeneration) -> int:
    """Tokens of a sequence, where neither the recipe nor the description says: 128, if they fit."""
    around = len(description.prefix) + len(description.suffix)
    return description.length or min(128, _positions(model) - around)


def masked_window(config: Any, spec: EvaluationSpec) -> int:
    """Tokens of text in a window or document of a masked language model."""
    # Two positions go to the special tokens.
    return spec.window or min(128, (positions_of(config) or 1 << 30) - 2)


def _positions(model: nn.Module) -> int:
    return positions_of(model.config) or 1 << 30


def _frame(model: nn.Module, tokenizer: Any, spec: EvaluationSpec, kind: Kind) -> Frame:
    """What stands around each window; nothing where there is no tokenizer to tell."""
    if tokenizer is None:
        return Frame()
    return frame_for(
        model.config, tokenizer, special_tokens=spec.special_tokens, kind=kind,
        documents=spec.packing == "documents",
    )  # fmt: skip


def _named(part: str, progress: Progress | None) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(part, done, total)


def joined(documents: Sequence[LongTensor]) -> LongTensor:
    """Documents as one row of ids [n] that tells where each ends: their lengths stand in front."""
    return torch.cat([torch.tensor([len(d) for d in documents]), *documents])


def ids_digest(tokens: LongTensor) -> str:
    data = tokens.to("cpu", torch.int64).contiguous().numpy().tobytes()
    return hashlib.sha256(data).hexdigest()
