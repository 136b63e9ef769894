"""A model with masked_generation in its config is evaluated as a masked generator."""

from __future__ import annotations

import pytest
import torch

from compress.errors import CompressError
from compress.eval import EvaluationResult, EvaluationSpec, evaluate
from compress.eval.evaluator import describe
from compress.eval.quality.denoising import sequences
from compress.eval.quality.generation import Judges, RealImages
from compress.eval.report import (
    Report,
    RunInfo,
    environment,
    findings,
    render_html,
    render_markdown,
)
from compress.eval.report.compare import compare
from compress.generators import ClassCondition, MaskedGeneration
from compress.models.kind import kind_of

QUICK = {
    "sequences": 4, "draws": 2, "ordered_sequences": 2, "samples": 8, "steps": (2, 4, 32),
}  # fmt: skip
SPEC = EvaluationSpec(latency=False, memory=False, generator=QUICK)
TEXT = EvaluationSpec(
    perplexity={"source": "t"}, window=12, latency=False, memory=False, generator=QUICK
)
DESCRIPTION = MaskedGeneration(mask_id=6, vocabulary=263, forbidden=tuple(range(6)))
PATCHES = MaskedGeneration(
    mask_id=210, vocabulary=200, condition=ClassCondition(offset=200, classes=2), length=4
)


@pytest.fixture
def generator(tiny):
    def build(family: str = "bert", description: MaskedGeneration = DESCRIPTION, **fields):
        model = tiny(family, **fields)
        description.store(model.config)
        return model

    return build


class Book:
    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        return (tokens[:, -4:].float() / 200).view(-1, 2, 2).repeat(1, 4, 4)


def judges() -> Judges:
    random = torch.Generator().manual_seed(0)
    pixels, labels = torch.rand(40, 8, 8, generator=random), torch.arange(40) % 2
    return Judges(decoder=Book(), images=RealImages("noise", pixels, labels, pixels, labels, 20))


def report(before: EvaluationResult | None, after: EvaluationResult) -> Report:
    return Report(
        title="a run", run=RunInfo(model="m"), before=before, after=after, environment=environment()
    )


def test_text_without_further_switches(generator, tokens, tokenizer) -> None:
    model = generator()
    found = evaluate(model, tokenizer, TEXT, tokens=tokens.flatten(), bytes_count=384)
    part = found.generator
    assert found.kind == "masked" and found.perplexity is None and found.masked is None
    assert part.likelihood.window == 12 and part.likelihood.sequences == 4
    assert part.likelihood.bits_per_byte == pytest.approx(part.likelihood.bits_per_token / 2)
    assert [r.rule for r in part.ordered] == ["confidence"] and part.ordered[0].sequences == 2
    assert [r.ratio for r in part.recovery] == [0.15, 0.5, 0.85]
    assert [p.steps for p in part.generation.points] == [2, 4]  # 32 are more than 12 tokens
    assert part.generation.points[0].evaluations == 2
    assert part.generation.points[0].text.unigram_entropy > 0
    assert part.generation.excerpts
    assert EvaluationResult.model_validate_json(found.model_dump_json()) == found
    assert found.cost.macs.context == 12
    again = evaluate(model, tokenizer, TEXT, tokens=tokens.flatten(), bytes_count=384)
    assert again.generator.likelihood == part.likelihood


def test_a_bidirectional_llama(generator, tiny, tokens, tokenizer) -> None:
    model = generator("llama", is_causal=False)
    assert kind_of(model) == "masked" and kind_of(tiny("llama")) == "causal"
    found = evaluate(model, tokenizer, TEXT, tokens=tokens.flatten())
    assert found.kind == "masked" and found.generator.likelihood.tokens == 48


def test_a_plain_masked_model_on_request(tiny, tokens, tokenizer) -> None:
    spec = TEXT.model_copy(update={"objective": "masked"})
    found = evaluate(tiny("bert"), tokenizer, spec, tokens=tokens.flatten())
    assert found.generator.likelihood.window == 12 and found.masked is None
    assert evaluate(tiny("bert"), tokenizer, TEXT, tokens=tokens.flatten()).generator is None


def test_pictures_curves_and_divergence_in_the_report(generator, tiny) -> None:
    rows = torch.randint(200, (6, 5), generator=torch.Generator().manual_seed(0))
    rows[:, 0] = 200 + torch.arange(6) % 2
    model, other = generator(description=PATCHES), generator(description=PATCHES, seed=1)
    data, judged = sequences(rows, fixed=PATCHES.fixed(rows)), judges()
    before = evaluate(model, None, SPEC, sequences=data, judges=judged)
    after = evaluate(other, None, SPEC, sequences=data, judges=judged, baseline=model)
    assert before.generator.likelihood.tokens == 4 * 4  # the class is never hidden
    assert after.generator.recovery[0].divergence > 0
    assert before.generator.recovery[0].divergence is None
    assert after.generator.generation.points[0].images.accuracy is not None
    made = report(before, after)
    page, text = render_html(made), render_markdown(made)
    assert page.count('src="data:image/png;base64,') == 2
    assert "img-src data:" in page and "<script" not in page and "//" not in page
    assert "original: a column a class" in page and "compressed: a column a class" in page
    assert page.count("network evaluations per sample") >= 2 and "FD(cnn-32)" in page
    assert "of its test images right" in page
    assert "## Samples" in text and text.index("## Quality") < text.index("## Samples")
    assert "KL from the original, 50% hidden" in text and "Perplexity bound" in text
    said = " ".join(f.text for f in findings(made))
    assert "The perplexity bound" in said and "Frechet distance of samples" in said
    assert "perplexity bound" in compare([made]).markdown()


def test_one_model_alone(generator, tokens, tokenizer) -> None:
    found = evaluate(generator(), tokenizer, TEXT, tokens=tokens.flatten())
    page = render_html(report(None, found))
    assert "unigram entropy" in page and "data:image" not in page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": {"ordr": "margin"}}, "Did you mean 'order'"),
        ({"sampler": {"order": "sideways"}}, "generator.sampler.order"),
        ({"steps": (64,)}, "steps of at most 12"),
    ],
)
def test_wrong_samplers_are_refused_before_any_work(
    generator, tokens, tokenizer, change: dict, message: str
) -> None:
    spec = EvaluationSpec(**{**TEXT.model_dump(), "generator": {**QUICK, **change}})
    model, seen = generator(), []
    model.register_forward_pre_hook(lambda *_: seen.append(1))
    with pytest.raises(CompressError, match=message):
        evaluate(model, tokenizer, spec, tokens=tokens.flatten())
    assert not seen


def test_a_causal_model_is_no_masked_generator(tiny, tokenizer) -> None:
    spec = EvaluationSpec(objective="masked")
    with pytest.raises(CompressError, match="is_causal"):
        describe(tiny("llama"), tokenizer, spec)
    with pytest.raises(CompressError, match="mask token"):
        describe(tiny("bert"), None, spec)
    assert describe(tiny("bert"), None, EvaluationSpec()) is None
