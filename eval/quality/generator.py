"""Everything that is measured of one masked generator: its law, its recall and its samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import LongTensor, nn

from compress.errors import CompressError, did_you_mean
from compress.eval.quality.denoising import Sequences, sequences
from compress.eval.quality.generation import Drawn, GenerationResult, Judges, generation_curve
from compress.eval.quality.likelihood import Estimator, LikelihoodResult, likelihood_bound
from compress.eval.quality.ordered import Rule, exact_ordered_nll
from compress.eval.quality.recovery import RecoveryResult, recovery

_FROZEN = ConfigDict(frozen=True, extra="forbid")
_LOGITS = 128 * 2**20  # bytes of logits that one batch may have


class GeneratorSpec(BaseModel):
    """What is measured of a masked generator."""

    model_config = _FROZEN

    sequences: int | None = Field(default=256, ge=1, description="score the first so many")
    draws: int = Field(default=8, ge=1, description="masks a sequence, for the likelihood bound")
    estimator: Estimator = Field(
        default="k-uniform", description="the integral estimators are there for comparison"
    )
    ratios: tuple[float, ...] = Field(
        default=(0.15, 0.5, 0.85), description="shares hidden for accuracy, cross entropy and KL"
    )
    ordered: tuple[Rule, ...] = Field(
        default=("confidence",), description="orders of exact decoding; one evaluation a token"
    )
    ordered_sequences: int = Field(default=16, ge=1, description="sequences decoded in order")
    samples: int = Field(default=500, ge=0, description="samples at each number of steps; 0: none")
    steps: tuple[int, ...] = Field(
        default=(4, 8, 16, 32),
        description="numbers of sampler steps; those above the length are left out",
    )
    sampler: dict[str, Any] = Field(
        default_factory=dict, description="fields of compress.generators.SamplerOptions but steps"
    )
    scorer: str | None = Field(
        default=None, description="causal model (hub id, folder, pypi:...) that judges texts"
    )
    seed: int = Field(default=0, description="of masks and samples")


class GeneratorResult(BaseModel):
    """What :func:`evaluate_generator` measured."""

    model_config = _FROZEN

    likelihood: LikelihoodResult | None = None
    ordered: tuple[LikelihoodResult, ...] = ()
    recovery: tuple[RecoveryResult, ...] = ()
    generation: GenerationResult | None = None


def text_sequences(
    tokens: LongTensor, description: Any, window: int, bytes_count: int | None = None
) -> Sequences:
    """Cut a text into windows as a masked generator reads them.

    Args:
        tokens: ids [n] without special tokens; what is left after the last window is not used.
        description: the model's :class:`compress.generators.MaskedGeneration`; what it puts around
            a text is put around each window, and never hidden.
        window: tokens of text in each.
        bytes_count: UTF-8 bytes of the text.

    Raises:
        CompressError: fewer tokens than one window.
    """
    if len(tokens) < window:
        raise CompressError(
            f"at least one window of {window} tokens", f"{len(tokens)} tokens",
            "Give a longer text or a smaller window",
        )  # fmt: skip
    text = tokens[: len(tokens) // window * window].reshape(-1, window)
    before, after = (
        torch.tensor(ids, dtype=torch.long).expand(len(text), -1)
        for ids in (description.prefix, description.suffix)
    )
    rows = torch.cat([before, text, after], dim=1)
    ratio = bytes_count / len(tokens) if bytes_count else None
    return sequences(rows, fixed=description.fixed(rows), bytes_per_token=ratio)


def sampler_options(spec: GeneratorSpec, length: int) -> list[Any]:
    """The sampler's options for each number of steps; refuses wrong ones before any work.

    Args:
        length: tokens that are generated.

    Raises:
        CompressError: an option that the sampler does not have, or more steps than tokens.
    """
    from compress.generators import SamplerOptions

    steps = [n for n in sorted(set(spec.steps)) if n <= length]
    if not steps:
        raise CompressError(
            f"generator.steps of at most {length}, the tokens of a sample",
            ", ".join(map(str, spec.steps)) or "none",
        )
    known = sorted(set(SamplerOptions.model_fields) - {"steps"})
    for name in spec.sampler:
        if name not in known:
            raise CompressError(
                "options of the sampler under generator.sampler", repr(name),
                did_you_mean(name, known),
            )  # fmt: skip
    try:
        return [SamplerOptions(**spec.sampler, steps=n) for n in steps]
    except ValidationError as error:
        first = error.errors()[0]
        raise CompressError(
            "options of the sampler", f"{first['input']!r} ({first['msg']})",
            where=".".join(["generator.sampler", *map(str, first["loc"])]),
        ) from None  # fmt: skip


def evaluate_generator(
    model: nn.Module,
    description: Any,
    spec: GeneratorSpec,
    *,
    data: Sequences | None = None,
    length: int | None = None,
    judges: Judges | None = None,
    original: nn.Module | None = None,
    batch_size: int = 16,
    known: GeneratorResult | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> GeneratorResult:
    """Measure a masked generator.

    Args:
        model: the denoiser.
        description: its :class:`compress.generators.MaskedGeneration`.
        spec: what to measure.
        data: held-out sequences; without them there is no likelihood and no recall.
        length: tokens generated in a sample where the description does not say.
        judges: what samples are judged with.
        original: the model that was compressed, for the divergence.
        batch_size: sequences per forward at most; fewer where logits would be large.
        known: likelihood and recall of the same model on the same data, where they have been
            measured; only samples are drawn then.

    Raises:
        CompressError: from the parts.
    """
    from compress.generators import Denoiser

    denoiser = Denoiser(model, description)
    first = Denoiser(original, description).logits if original is not None else None
    generated = description.length or length or 0
    options = sampler_options(spec, generated) if spec.samples else []
    parts: dict[str, Any] = {}

    def told(part: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, total: progress(part, done, total)

    if known is not None:
        parts |= {name: getattr(known, name) for name in ("likelihood", "ordered", "recovery")}
    elif data is not None:
        data = data.head(spec.sequences or len(data))
        size = _batch(model, data.tokens.shape[1], batch_size)
        shared = {"mask_id": description.mask_id, "batch_size": size}
        parts["likelihood"] = likelihood_bound(
            denoiser.logits, data, draws=spec.draws, estimator=spec.estimator, seed=spec.seed,
            progress=told("likelihood"), **shared,
        )  # fmt: skip
        parts["ordered"] = tuple(
            exact_ordered_nll(
                denoiser.logits, data.head(spec.ordered_sequences), rule=rule,
                progress=told(f"likelihood, {rule}"), **shared,
            )
            for rule in spec.ordered
        )  # fmt: skip
        parts["recovery"] = recovery(
            denoiser.logits, data, ratios=spec.ratios, original=first, seed=spec.seed,
            progress=told("masked tokens"), **shared,
        )  # fmt: skip
    if options:
        size = _batch(model, generated + 2, 4 * batch_size)
        parts["generation"] = _samples(
            denoiser, options, spec, generated, judges or Judges(), size, told("samples")
        )
    return GeneratorResult(**parts)


def _samples(
    denoiser: Any,
    options: list[Any],
    spec: GeneratorSpec,
    length: int,
    judges: Judges,
    batch: int,
    progress: Callable[[int, int], None] | None,
) -> GenerationResult:
    """Draw and judge samples; classes take turns, and every number of steps has the same seeds."""
    from compress.generators import ClassCondition, sample

    condition, classes = denoiser.spec.condition, None
    if isinstance(condition, ClassCondition):
        classes = torch.arange(spec.samples) % condition.classes
    asked: dict[str, Any] = {"count": spec.samples} if classes is None else {"classes": classes}
    by_steps = {option.steps: option for option in options}

    def draw(steps: int) -> Drawn:
        found = sample(
            denoiser, by_steps[steps], length=length, seeds=spec.seed, batch=batch, **asked
        )
        return Drawn(
            tokens=found.tokens,
            generated=found.generated,
            evaluations=found.evaluations,
            block_forwards=found.evaluations * denoiser.blocks,
            token_block_forwards=found.counters.token_block_forwards / len(found.tokens),
        )

    shown = options[0].model_dump(exclude={"steps"}, exclude_none=True)
    shown["schedule"] = options[0].schedule_of(denoiser.spec)
    return generation_curve(
        draw, list(by_steps), judges, classes=classes, seed=spec.seed, sampler=shown,
        progress=progress,
    )  # fmt: skip


def _batch(model: nn.Module, length: int, most: int) -> int:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return max(1, min(most, _LOGITS // (4 * length * vocabulary)))
