"""evaluate() picks what fits the model, and its result can be stored and used again."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

import compress
from compress.errors import CompressError
from compress.eval import EvaluationResult, EvaluationSpec, evaluate
from compress.eval.report.findings import findings

SHAPE = dict(
    vocab_size=100,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=64,
)


class Special:
    """What is asked of a tokenizer that puts 2 in front of a text and 3 behind it."""

    mask_token_id = 4

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [10 + ord(c) % 80 for c in text]
        return {"input_ids": [2, *ids, 3] if add_special_tokens else ids}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"<{i}>" for i in ids]


SPECIAL = Special()
SPEC = EvaluationSpec(
    perplexity={"name": "a text"},
    max_tokens=200,
    latency={"prefill_tokens": 8, "decode_tokens": 2, "repeats": 3},
    masked={"pll_positions": 8},
)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(5, 100, (300,), generator=torch.Generator().manual_seed(0))


def test_causal(tokens, tmp_path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    model.save_pretrained(tmp_path)
    spec = SPEC.model_copy(update={"memory": False})
    seen = []
    found = evaluate(
        model,
        None,
        spec,
        tokens=tokens,
        folder=tmp_path,
        baseline=model,
        progress=lambda *p: seen.append(p),
    )
    assert found.kind == "causal" and found.masked is None
    assert found.perplexity.window == 64  # the model has no more positions
    assert found.perplexity.tokens == 3 * 63  # of the first 200 tokens
    assert found.latency.repeats == 3
    assert found.cost.size.bits_per_weight == 32 and found.cost.memory is None
    assert set(found.seconds) == {"perplexity", "latency", "cost"}
    assert seen[-1] == ("perplexity", 3, 3)
    assert EvaluationResult.model_validate_json(found.model_dump_json()) == found


def test_without_a_key_value_cache_decoding_is_not_timed(
    tokens, tiny, checkpoint, helpers, text, report
) -> None:
    """Mamba calls its state by another name; RecurrentGemma takes a cache and returns none."""
    shape = {**SHAPE, "num_hidden_layers": 3, "lru_width": 32}
    keeper = RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**shape))
    spec = SPEC.model_copy(update={"memory": False, "window": 32})
    for model in (tiny("mamba"), keeper):
        found = evaluate(model, None, spec, tokens=tokens, baseline=model)
        assert found.latency.decode is None and found.latency.prefill_tokens == 8
        said = [f.text for f in findings(report(found, found))]
        assert any(f"not timed: a {type(model).__name__} has no key-value" in s for s in said)
    given = {"text": {"source": str(text)}, "window": 32}
    for family, told in (("mamba", True), ("llama", False)):
        plan = compress.plan(helpers.recipe(checkpoint(family), ["magnitude"], evaluation=given))
        assert told == any("decoding is not timed: a Mamba" in w for w in plan.warnings)


def test_masked(tokens) -> None:
    model = BertForMaskedLM(BertConfig(**SHAPE))
    found = evaluate(model, SPECIAL, SPEC, tokens=tokens)
    assert found.kind == "masked" and found.perplexity is None
    assert found.masked.window == 62 and found.masked.pll_positions == 8
    assert found.latency is None  # no original to pair with
    assert EvaluationResult.model_validate_json(found.model_dump_json()) == found


def test_the_text_is_identified(tokens) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    first, again = (evaluate(model, None, SPEC, tokens=tokens) for _ in range(2))
    other = evaluate(model, None, SPEC, tokens=tokens.flip(0))
    assert first.tokens_sha256 == again.tokens_sha256 != other.tokens_sha256


@pytest.mark.parametrize(
    ("model", "tokenizer", "spec", "message"),
    [
        (LlamaForCausalLM, None, SPEC, "tokens of the evaluation text"),
        (LlamaModel, None, EvaluationSpec(), "AutoModelForCausalLM"),
        (BertForMaskedLM, None, EvaluationSpec(tasks=("piqa",)), "mask token"),
        (LlamaForCausalLM, None, EvaluationSpec(tasks=("piqa",)), "a tokenizer"),
    ],
)
def test_refusals(model, tokenizer, spec, message) -> None:
    config = (BertConfig if model is BertForMaskedLM else LlamaConfig)(**SHAPE)
    with pytest.raises(CompressError, match=message):
        evaluate(model(config), tokenizer, spec)


def test_masked_scores_need_a_mask_token(tokens) -> None:
    model = BertForMaskedLM(BertConfig(**SHAPE))
    with pytest.raises(CompressError, match="mask token"):
        evaluate(model, None, SPEC, tokens=tokens)


def test_spec_refuses_unknown_keys_and_is_frozen() -> None:
    with pytest.raises(ValueError, match="extra"):
        EvaluationSpec(windows=3)
    with pytest.raises(ValueError, match="frozen"):
        SPEC.window = 3
    assert EvaluationSpec.model_validate_json(SPEC.model_dump_json()) == SPEC


def test_importing_eval_imports_nothing_heavy() -> None:
    heavy = "[m for m in ('torch', 'transformers') if m in sys.modules]"
    code = f"import sys, compress.eval; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
