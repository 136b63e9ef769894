"""Evaluate one model: quality by its kind, cost, and latency against the original."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import LongTensor, nn

from compress.data.framing import Frame, Kind, frame_for
from compress.errors import CompressError
from compress.eval.cost import cost, paired_latency
from compress.eval.quality.denoising import Sequences
from compress.eval.quality.generation import Judges
from compress.eval.quality.generator import evaluate_generator, text_sequences
from compress.eval.quality.masked import masked_scores
from compress.eval.quality.perplexity import perplexity
from compress.eval.quality.tasks import run_tasks
from compress.eval.spec import EvaluationResult, EvaluationSpec
from compress.generators.description import MaskedGeneration, is_masked_generator
from compress.models.kind import kind_of
from compress.models.positions import positions_of

Progress = Callable[[str, int, int], None]


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    spec: EvaluationSpec,
    *,
    tokens: LongTensor | None = None,
    documents: Sequence[LongTensor] | None = None,
    bytes_count: int | None = None,
    folder: str | Path | None = None,
    baseline: nn.Module | None = None,
    sequences: Sequences | None = None,
    judges: Judges | None = None,
    data_root: str | Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> EvaluationResult:
    """Measure quality and cost of ``model``; the result can be stored as JSON and used again.

    Args:
        model: causal (perplexity, tasks) or masked (masked scores, tasks) language model, or a
            masked generator (likelihood bound, hidden tokens, samples).
        tokenizer: its tokenizer; needed for tasks, for masked scores and to know which special
            tokens stand around a window, else it may be None.
        spec: what to measure.
        tokens: token ids [n] of the evaluation text without special tokens; needed when
            ``spec.perplexity`` is given.
        documents: instead of ``tokens``, for a masked model: those of each document.
        bytes_count: UTF-8 bytes of the text behind ``tokens``, for bits per byte.
        folder: the checkpoint on disk, for bytes and peak memory.
        baseline: the original model; with it, latency is measured in pairs, and the divergence of
            a masked generator from it.
        sequences: of a masked generator, what it is scored on where that is not ``tokens``.
        judges: of a masked generator, what its samples are judged with; a text's by default.
        data_root: folder with the data of local tasks.
        trust_remote_code: handed on to the process that measures memory.
        progress: called with (part, done, total).

    Raises:
        CompressError: from the parts; also a spec without its tokens, or without a description of
            the generator that it asks for.
    """
    kind = kind_of(model)
    generates = describe(model, tokenizer, spec)
    has_text = any(x is not None for x in (tokens, documents, sequences))
    _check(kind, model, tokenizer, spec, has_text)
    seconds: dict[str, float] = {}
    parts: dict[str, Any] = {}

    def measure(part: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        start = time.perf_counter()
        parts[part] = function(*args, **kwargs)
        seconds[part] = time.perf_counter() - start

    if documents is not None and spec.perplexity is not None and generates is None:
        measure("masked", _masked, model, tokenizer, spec, documents, progress)
    elif tokens is not None and spec.perplexity is not None:
        tokens, bytes_count = _head(tokens, bytes_count, spec.max_tokens, tokenizer)
        if generates is not None:
            length = spec.window or generates.length or window_of(model, generates)
            around = generates if spec.special_tokens else generates.without_frame()
            sequences = sequences or text_sequences(tokens, around, length, bytes_count)
        elif kind == "masked":
            measure("masked", _masked, model, tokenizer, spec, tokens, progress)
        else:
            measure(
                "perplexity", _perplexity, model, tokenizer, spec, tokens, bytes_count, progress
            )
    if generates is not None:
        measure(
            "generator",
            evaluate_generator,
            model,
            generates,
            spec.generator,
            data=sequences,
            length=spec.window or window_of(model, generates),
            judges=judges or _text_judges(tokenizer),
            original=baseline,
            batch_size=max(spec.batch_size, 16),
            progress=progress,
        )
    if spec.tasks:
        measure(
            "tasks",
            run_tasks,
            model,
            tokenizer,
            spec.tasks,
            limit=spec.limit,
            num_fewshot=spec.num_fewshot,
            batch_size=spec.batch_size,
            data_root=data_root,
            masked=spec.masked_tasks,
            special_tokens=spec.special_tokens,
        )
    latency = spec.latency_spec()
    if latency and baseline is not None:
        positions = positions_of(model.config)
        latency = latency.within(positions, kind == "causal")
        measure("latency", paired_latency, baseline, model, **latency.model_dump())
    measure(
        "cost",
        cost,
        model,
        folder,
        context=spec.context or _context(model, generates, sequences, spec),
        memory=spec.memory,
        trust_remote_code=trust_remote_code,
    )
    return EvaluationResult(
        model_class=type(model).__name__,
        kind=kind,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        spec=spec,
        tokens_sha256=_scored(tokens, documents, sequences, spec),
        seconds=seconds,
        **parts,
    )


def _check(
    kind: str, model: nn.Module, tokenizer: Any, spec: EvaluationSpec, has_text: bool
) -> None:
    if spec.perplexity is not None and not has_text:
        raise CompressError("the tokens of the evaluation text", "none", where="evaluate")
    if kind == "other":
        raise CompressError(
            "a causal or a masked language model", type(model).__name__,
            "Load it with AutoModelForCausalLM or AutoModelForMaskedLM", where="evaluate",
        )  # fmt: skip
    described = is_masked_generator(model.config)
    scored = kind == "masked" and (spec.perplexity is not None or spec.tasks)
    if scored and not described and getattr(tokenizer, "mask_token_id", None) is None:
        raise CompressError(
            "a tokenizer with a mask token", "none", "Use the model's own", where="evaluate"
        )


def describe(model: nn.Module, tokenizer: Any, spec: EvaluationSpec) -> MaskedGeneration | None:
    """What ``model`` generates, where it is evaluated as a masked generator.

    Raises:
        CompressError: ``objective: masked`` for a model that cannot be one.
    """
    if spec.objective == "causal":
        return None
    if spec.objective == "masked" or is_masked_generator(model.config):
        return MaskedGeneration.of(model, tokenizer)
    return None


def window_of(model: nn.Module, description: MaskedGeneration) -> int:
    """Tokens of a sequence, where neither the recipe nor the description says: 128, if they fit."""
    around = len(description.prefix) + len(description.suffix)
    return description.length or min(128, _positions(model) - around)


def _context(
    model: nn.Module,
    generates: MaskedGeneration | None,
    sequences: Sequences | None,
    spec: EvaluationSpec,
) -> int:
    """Tokens that a token attends to, where the spec does not say."""
    if generates is None:
        return 1024
    if sequences is not None:
        return int(sequences.sizes.max())
    return spec.window or window_of(model, generates)


def _text_judges(tokenizer: Any) -> Judges:
    if not hasattr(tokenizer, "batch_decode"):
        return Judges()
    return Judges(to_text=lambda ids: tokenizer.batch_decode(ids, skip_special_tokens=True))


def _scored(
    tokens: LongTensor | None,
    documents: Sequence[LongTensor] | None,
    sequences: Sequences | None,
    spec: EvaluationSpec,
) -> str | None:
    if sequences is not None:
        return _digest(sequences.tokens)
    if documents is not None:
        return _digest(torch.cat([torch.tensor([len(d) for d in documents]), *documents]))
    return _digest(tokens) if spec.perplexity is not None else None


def _head(
    tokens: LongTensor, bytes_count: int | None, limit: int | None, tokenizer: Any
) -> tuple[LongTensor, int | None]:
    """Cut the text to ``limit`` tokens, and its bytes with it."""
    if limit is None or len(tokens) <= limit:
        return tokens, bytes_count
    tokens = tokens[:limit]
    if bytes_count is None or tokenizer is None:
        return tokens, None
    return tokens, len(tokenizer.decode(tokens.tolist()).encode("utf-8"))


def _positions(model: nn.Module) -> int:
    return positions_of(model.config) or 1 << 30


def _perplexity(
    model: nn.Module,
    tokenizer: Any,
    spec: EvaluationSpec,
    tokens: LongTensor,
    bytes_count: int | None,
    progress: Progress | None,
) -> Any:
    frame = _frame(model, tokenizer, spec, "causal")
    # The last token of a window is not run: one special token fits beside as many as there are.
    longest = _positions(model) - max(0, len(frame.prefix) - 1)
    return perplexity(
        model,
        tokens,
        prefix=frame.prefix,
        window=spec.window or min(1024, longest),
        stride=spec.stride,
        batch_size=spec.batch_size,
        bytes_count=bytes_count,
        progress=_named("perplexity", progress),
    )


def _masked(
    model: nn.Module,
    tokenizer: Any,
    spec: EvaluationSpec,
    tokens: LongTensor | Sequence[LongTensor],
    progress: Progress | None,
) -> Any:
    frame = _frame(model, tokenizer, spec, "masked")
    return masked_scores(
        model,
        tokens,
        mask_token_id=tokenizer.mask_token_id,
        prefix=frame.prefix,
        suffix=frame.suffix,
        window=masked_window(model.config, spec),
        batch_size=max(spec.batch_size, 8),
        progress=_named("masked", progress),
        **spec.masked.model_dump(),
    )


def masked_window(config: Any, spec: EvaluationSpec) -> int:
    """Tokens of text in a window or document of a masked language model."""
    # Two positions go to the special tokens.
    return spec.window or min(128, (positions_of(config) or 1 << 30) - 2)


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


def _digest(tokens: LongTensor) -> str:
    data = tokens.to("cpu", torch.int64).contiguous().numpy().tobytes()
    return hashlib.sha256(data).hexdigest()
