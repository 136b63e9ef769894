"""Evaluate one model: quality by its kind, cost, and latency against the original."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import LongTensor, nn

from compress.data.labelled import rows_digest
from compress.errors import CompressError
from compress.eval.cache import Figures
from compress.eval.cost import cost, paired_latency
from compress.eval.parts import (
    Parts,
    Progress,
    continuations_part,
    generator_part,
    ids_digest,
    joined,
    labels_part,
    masked_part,
    perplexity_part,
    tasks_part,
    window_of,
)
from compress.eval.quality.denoising import Sequences
from compress.eval.quality.generation import Judges
from compress.eval.quality.generator import text_sequences
from compress.eval.spec import EvaluationResult, EvaluationSpec
from compress.generators.description import MaskedGeneration, is_masked_generator
from compress.models.inputs import ImageRows, Rows
from compress.models.kind import has_key_value_cache, kind_of
from compress.models.positions import positions_of


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
    examples: Rows | ImageRows | None = None,
    data_root: str | Path | None = None,
    trust_remote_code: bool = False,
    figures: Figures | None = None,
    progress: Progress | None = None,
) -> EvaluationResult:
    """Measure quality and cost of ``model``; the result can be stored as JSON and used again.

    Args:
        model: causal (perplexity, tasks) or masked (masked scores, tasks) language model, a
            masked generator (likelihood bound, hidden tokens, samples), or a model with a head of
            labels (accuracy and other scores).
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
        examples: of a model with a head of labels, what it answers; needed when ``spec.examples``
            is given.
        data_root: folder with the data of local tasks.
        trust_remote_code: handed on to the process that measures memory.
        figures: of the checkpoint that ``model`` was loaded from and nobody has changed since:
            quality is taken from there where the same was measured before, and kept there where
            not. Not kept are samples of a generator (their time is a figure, and others judge
            them), what is measured against ``baseline``, and tasks with data from the hub.
        progress: called with (part, done, total).

    Raises:
        CompressError: from the parts; also a spec without its tokens, or without a description of
            the generator that it asks for.
    """
    kind = kind_of(model)
    generates = describe(model, tokenizer, spec)
    has_text = any(x is not None for x in (tokens, documents, sequences))
    _check(kind, model, tokenizer, spec, has_text)
    if spec.examples is not None and examples is None:
        raise CompressError("the examples of the evaluation", "none", where="evaluate")
    parts = Parts(model, figures)
    if examples is not None:
        labels_part(parts, model, spec, examples, progress)
    if documents is not None and spec.perplexity is not None and generates is None:
        masked_part(parts, model, tokenizer, spec, documents, progress)
    elif tokens is not None and spec.perplexity is not None:
        tokens, bytes_count = _head(tokens, bytes_count, spec.max_tokens, tokenizer)
        if generates is not None:
            length = spec.window or generates.length or window_of(model, generates)
            around = generates if spec.special_tokens else generates.without_frame()
            sequences = sequences or text_sequences(tokens, around, length, bytes_count)
        elif kind == "masked":
            masked_part(parts, model, tokenizer, spec, tokens, progress)
        else:
            perplexity_part(parts, model, tokenizer, spec, tokens, bytes_count, progress)
            if spec.continuations and tokenizer is not None:
                continuations_part(parts, model, tokenizer, spec, tokens)
    if generates is not None:
        generator_part(
            parts, model, spec, generates, sequences, judges or _text_judges(tokenizer), baseline,
            progress,
        )  # fmt: skip
    if spec.tasks:
        tasks_part(parts, model, tokenizer, spec, data_root)
    latency = spec.latency_spec()
    if latency and baseline is not None:
        positions = positions_of(model.config)
        decodes = kind == "causal" and all(map(has_key_value_cache, (baseline, model)))
        latency = latency.within(positions, decodes)
        if not decodes:
            latency = latency.model_copy(update={"decode_tokens": 0})
        parts.measure("latency", lambda: paired_latency(baseline, model, **latency.model_dump()))
    parts.measure(
        "cost",
        lambda: cost(
            model,
            folder,
            context=spec.context or _context(model, generates, sequences, examples, spec),
            memory=spec.memory,
            trust_remote_code=trust_remote_code,
        ),
    )
    return EvaluationResult(
        model_class=type(model).__name__,
        kind=kind,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        spec=spec,
        tokens_sha256=_scored(tokens, documents, sequences, examples, spec),
        seconds=parts.seconds,
        cached=parts.cached,
        **parts.found,
    )


def _check(
    kind: str, model: nn.Module, tokenizer: Any, spec: EvaluationSpec, has_text: bool
) -> None:
    if spec.perplexity is not None and not has_text:
        raise CompressError("the tokens of the evaluation text", "none", where="evaluate")
    if kind == "other":
        raise CompressError(
            "a causal or a masked language model, or one with a head of labels",
            type(model).__name__,
            "Load it with AutoModelForCausalLM, AutoModelForMaskedLM, "
            "AutoModelForSequenceClassification or AutoModelForImageClassification",
            where="evaluate",
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


def _context(
    model: nn.Module,
    generates: MaskedGeneration | None,
    sequences: Sequences | None,
    examples: Rows | ImageRows | None,
    spec: EvaluationSpec,
) -> int:
    """Tokens that a token attends to, where the spec does not say."""
    if examples is not None:
        return int(examples.lengths.max())
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
    examples: Rows | ImageRows | None,
    spec: EvaluationSpec,
) -> str | None:
    if examples is not None:
        return rows_digest(examples)
    if sequences is not None:
        return ids_digest(sequences.tokens)
    if documents is not None:
        return ids_digest(joined(documents))
    return ids_digest(tokens) if spec.perplexity is not None else None


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
