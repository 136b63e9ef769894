"""What an evaluation measures, and what came out: two models that survive a round trip to JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from compress.errors import CompressError
from compress.eval.cost import CostResult, PairedLatency, PeakMemory
from compress.eval.quality.continuations import Continuation
from compress.eval.quality.generator import GeneratorResult, GeneratorSpec
from compress.eval.quality.labels import LabelsResult
from compress.eval.quality.masked import MaskedResult
from compress.eval.quality.perplexity import PerplexityResult
from compress.eval.quality.tasks import TaskSpec, TasksResult

_FROZEN = ConfigDict(frozen=True, extra="forbid")


class LatencySpec(BaseModel):
    """Paired timing against the original."""

    model_config = _FROZEN

    prefill_tokens: int = Field(default=512, ge=1, description="tokens of the prompt")
    decode_tokens: int = Field(
        default=32, ge=0, description="tokens generated after it, with a key-value cache"
    )
    repeats: int = Field(default=7, ge=3, description="pairs of timings")

    def within(self, positions: int | None, decodes: bool) -> LatencySpec:
        """The same, what was left to the defaults shortened to a model's positions.

        Args:
            positions: of the model; None where it knows no limit.
            decodes: whether tokens are decoded after the prefill (causal models).

        Raises:
            CompressError: what was asked for does not fit.
        """
        prefill, decode = self.prefill_tokens, self.decode_tokens if decodes else 0
        if not positions or prefill + decode <= positions:
            return self
        given = self.model_fields_set
        if decodes and "decode_tokens" not in given:
            room = positions - prefill if "prefill_tokens" in given else positions // 4
            decode = min(decode, max(room, 1))
        if "prefill_tokens" not in given:
            # Masked models may number their positions from padding_idx + 1, as RoBERTa does.
            prefill = positions - decode if decodes else positions - 4
        if prefill < 1 or prefill + decode > positions:
            raise CompressError(
                f"prefill and decode within the model's {positions} positions",
                f"{prefill + decode} tokens", "Set smaller prefill_tokens and decode_tokens",
                where="latency",
            )  # fmt: skip
        shorter = {"prefill_tokens": prefill} | ({"decode_tokens": decode} if decodes else {})
        return self.model_copy(update=shorter)


class MaskedSpec(BaseModel):
    """Scores of masked language models."""

    model_config = _FROZEN

    mask_fraction: float = Field(
        default=0.15, gt=0, lt=1, description="share of the tokens that is masked at once"
    )
    pll_positions: int = Field(default=256, ge=1, description="positions masked one at a time")
    seed: int = Field(default=0, description="of which tokens are masked")


class ToleranceSpec(BaseModel):
    """What a user of the model would put up with; the report's verdicts hold intervals against it.

    A change is within the tolerance when its whole 95 % interval is, outside when none of it is.
    """

    model_config = _FROZEN

    perplexity: float = Field(
        default=0.05, ge=0, description="of perplexities and other losses, as a share: 0.05 is 5 %"
    )
    accuracy: float = Field(
        default=0.01,
        ge=0,
        lt=1,
        description="of accuracies and other scores up to 1 (F1, correlations), absolute: 0.01 is "
        "one point",
    )
    speed: float = Field(
        default=0.05, ge=0, lt=1, description="of latency: a smaller change is not called one"
    )


class EvaluationSpec(BaseModel):
    """What to measure: perplexity of causal models, masked scores of masked ones, of masked
    generators (models with ``masked_generation`` in their config) their likelihood and samples,
    and of models with a head of labels how their answers agree with the labels of examples.
    """

    model_config = _FROZEN

    objective: Literal["auto", "causal", "masked"] = Field(
        default="auto",
        description="auto: what the config and the class say; masked: as a masked generator, also "
        "where the config does not call the model one; causal: never as one",
    )

    perplexity: dict[str, Any] | None = Field(
        default=None,
        description="which text is scored, as the caller describes it; kept for the report. "
        "The tokens themselves are handed to evaluate(), which loads no data",
    )
    images: dict[str, Any] | None = Field(
        default=None,
        description="which images a model of images is held against (source, limit), as the caller "
        "describes them; kept for the report",
    )
    examples: dict[str, Any] | None = Field(
        default=None,
        description="which labelled examples a model with a head of labels answers, as the caller "
        "describes them (a task of GLUE, or source, split, text, text_pair, label ...); kept for "
        "the report. evaluate() is handed the examples themselves",
    )
    length: int | None = Field(
        default=None,
        ge=2,
        description="tokens of an example at most, special ones included; default 128, less for a "
        "model with fewer positions",
    )
    packing: Literal["stream", "documents"] = Field(
        default="stream",
        description="masked models of text: windows of one stream, or a document a sequence, cut "
        "to the window",
    )
    special_tokens: bool = Field(
        default=True,
        description="put around each window what the tokenizer adds by itself (BOS in front for "
        "causal models, [CLS] and [SEP] for masked ones; never predicted nor masked), or what a "
        "masked generator's description says",
    )
    window: int | None = Field(
        default=None,
        ge=2,
        description="tokens of text per window; default 1024 (causal) or 128 (masked), less for a "
        "model with fewer positions",
    )
    stride: int | None = Field(default=None, ge=1, description="default: the window, no overlap")
    max_tokens: int | None = Field(default=32768, ge=2, description="use the head of the text")
    continuations: int = Field(
        default=3,
        ge=0,
        le=20,
        description="causal models: beginnings of the text that the report shows both models go on "
        "with; 0: none",
    )
    batch_size: int = Field(
        default=1, ge=1, description="sequences a forward, more where none is longer than another"
    )
    masked: MaskedSpec = Field(default=MaskedSpec(), description="scores of masked language models")
    generator: GeneratorSpec = Field(
        default=GeneratorSpec(), description="likelihood and samples of masked generators"
    )
    tasks: tuple[str, ...] = Field(
        default=(), description="lm-eval tasks: names, or YAML files with tasks of your own"
    )
    include_path: tuple[str, ...] = Field(
        default=(),
        description="folders with lm-eval tasks of your own, which tasks may then name; functions "
        "that they name are run",
    )

    @field_validator("include_path", mode="before")
    @classmethod
    def _one_folder(cls, value: Any) -> Any:
        return (str(value),) if isinstance(value, (str, Path)) else value

    masked_tasks: TaskSpec = Field(
        default=TaskSpec(), description="how a masked model scores the answers of tasks"
    )
    limit: int | None = Field(default=None, ge=1, description="documents per task")
    num_fewshot: int | None = Field(
        default=None, ge=0, description="examples in the prompts of tasks; default: the task's own"
    )
    latency: bool | LatencySpec = Field(
        default=True, description="paired timing; needs the original model beside it"
    )
    tolerance: ToleranceSpec = Field(
        default=ToleranceSpec(), description="what change the report calls within or outside"
    )
    memory: bool = Field(default=True, description="peak memory in a fresh process; needs a folder")
    runtimes: tuple[Literal["onnx", "gguf"], ...] = Field(
        default=(),
        description="beside transformers: the result is exported (docs/export.md) to be measured "
        "in onnxruntime or llama.cpp too: speed, memory, bytes, quality of what runs there",
    )
    context: int | None = Field(
        default=None,
        ge=1,
        description="tokens attended to, for MACs per token; default 1024, or the length of a "
        "masked generator's sequences or of the longest example",
    )
    cache: bool = Field(
        default=True,
        description="quality figures of the original, or of a model that is evaluated alone, from "
        "the toolkit's cache where the same was measured before; false: measured in any case, and "
        "not kept",
    )

    def latency_spec(self) -> LatencySpec | None:
        """Return the timing options, or None where timing is off."""
        if isinstance(self.latency, LatencySpec):
            return self.latency
        return LatencySpec() if self.latency else None


class RuntimeResult(BaseModel):
    """What one model scored and costs where another runtime runs it; round-trips through JSON."""

    model_config = _FROZEN

    runtime: Literal["onnx", "gguf"]
    execution: str = Field(description="which version of it ran, and where")
    bytes: int = Field(description="of all files: graph, weights, config, tokenizer")
    memory: PeakMemory | None = Field(
        default=None, description="of a fresh process; torch is among its libraries"
    )
    latency: PairedLatency | None = Field(
        default=None, description="before: the original in transformers, float32"
    )
    own_latency: PairedLatency | None = Field(
        default=None, description="before: the original in the same runtime, float32"
    )
    perplexity: PerplexityResult | None = None
    masked: MaskedResult | None = None
    continuations: tuple[Continuation, ...] = ()


class EvaluationResult(BaseModel):
    """What one model scored and costs; round-trips through JSON."""

    model_config = _FROZEN

    model_class: str
    kind: Literal["causal", "masked", "labels", "other"]
    dtype: str
    device: str
    spec: EvaluationSpec
    tokens_sha256: str | None = Field(description="digest of the token ids that were scored")
    perplexity: PerplexityResult | None = None
    masked: MaskedResult | None = None
    generator: GeneratorResult | None = None
    labels: LabelsResult | None = None
    tasks: TasksResult | None = None
    continuations: tuple[Continuation, ...] = Field(
        default=(), description="how the model goes on with beginnings of the text"
    )
    cost: CostResult
    latency: PairedLatency | None = Field(
        default=None, description="against the original; before is the original, after this model"
    )
    runtimes: tuple[RuntimeResult, ...] = Field(
        default=(), description="the same model exported to other runtimes"
    )
    seconds: dict[str, float] = Field(
        description="part of the evaluation -> seconds it took; for one from the cache, those when "
        "it was measured"
    )
    cached: dict[str, str] = Field(
        default_factory=dict,
        description="part whose quality figures came from the cache -> when they were measured, "
        "ISO 8601 in UTC",
    )
