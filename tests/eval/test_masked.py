"""Masked scores agree with one-at-a-time masking done by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from compress.errors import CompressError
from compress.eval.quality.masked import MaskedResult, masked_scores

SHAPE = dict(
    vocab_size=101,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=40,
    pad_token_id=1,
)
DISTIL = DistilBertConfig(
    vocab_size=101, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=40
)
MASK, CLS, SEP = 4, 2, 3
FAMILIES = {
    "bert": lambda: BertForMaskedLM(BertConfig(**SHAPE)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**SHAPE)),
    "distilbert": lambda: DistilBertForMaskedLM(DISTIL),
    "albert": lambda: AlbertForMaskedLM(AlbertConfig(**SHAPE, embedding_size=16)),
    "modernbert": lambda: ModernBertForMaskedLM(ModernBertConfig(**SHAPE)),
}


def build(family: str) -> nn.Module:
    torch.manual_seed(0)
    model = FAMILIES[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(5, 101, (70,), generator=torch.Generator().manual_seed(1))


def score(model: nn.Module, tokens: torch.Tensor, **options) -> MaskedResult:
    defaults = dict(mask_token_id=MASK, prefix=[CLS], suffix=[SEP], window=30, pll_positions=60)
    return masked_scores(model, tokens, **{**defaults, **options})


@pytest.mark.parametrize("family", FAMILIES)
def test_pseudo_log_likelihood_by_hand(family: str, tokens: torch.Tensor) -> None:
    model = build(family)
    result = score(model, tokens)
    total = 0.0
    model.eval()
    for window in (tokens[:30], tokens[30:60]):
        ids = torch.cat([torch.tensor([CLS]), window, torch.tensor([SEP])]).repeat(30, 1)
        for position in range(30):
            ids[position, position + 1] = MASK
        with torch.no_grad():
            logits = model(input_ids=ids).logits.log_softmax(-1)
        total += sum(logits[p, p + 1, window[p]].item() for p in range(30))
    assert result.pll_positions == 60
    assert result.pll == pytest.approx(total / 60, rel=1e-4)
    low, high = result.pseudo_perplexity_interval
    assert low < result.pseudo_perplexity < high


def test_the_draws_depend_on_the_seed_alone(tokens: torch.Tensor) -> None:
    model = build("bert")
    first = score(model, tokens, pll_positions=10)
    assert first == score(model, tokens, pll_positions=10)
    batched = score(model, tokens, pll_positions=10, batch_size=3)
    assert (batched.pll, batched.cross_entropy) == pytest.approx((first.pll, first.cross_entropy))
    other = score(model, tokens, pll_positions=10, seed=1)
    assert (first.cross_entropy, first.pll) != (other.cross_entropy, other.pll)
    assert first.masked_positions == 2 * 4  # round(0.15 * 30) tokens in each of two windows


def test_a_model_that_knows_the_answer_scores_full_marks(tokens: torch.Tensor) -> None:
    model = build("bert")
    with torch.no_grad():
        model.cls.predictions.bias.zero_()
        model.cls.predictions.bias[7] = 1e4
    result = score(model, torch.full((60,), 7))
    assert (result.accuracy, result.accuracy_stderr) == (1.0, 0.0)
    assert result.cross_entropy == pytest.approx(0, abs=1e-6)
    assert score(model, torch.full((60,), 8)).accuracy == 0.0


def test_result_survives_json_even_when_the_model_is_hopeless() -> None:
    model = build("bert")
    with torch.no_grad():
        model.cls.predictions.bias[7] = 1e4
    result = score(model, torch.full((60,), 8))
    assert MaskedResult.model_validate_json(result.model_dump_json()) == result


def test_refuses_a_causal_model(tokens: torch.Tensor) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    with pytest.raises(CompressError, match=r"causal.*Use perplexity"):
        score(model, tokens)


def test_refuses_a_window_that_does_not_fit(tokens: torch.Tensor) -> None:
    with pytest.raises(CompressError, match="40 positions"):
        score(build("bert"), tokens, window=39)
    # RoBERTa numbers positions from padding_idx + 1 = 2.
    with pytest.raises(CompressError, match="38 positions"):
        score(build("roberta"), tokens, window=37)
    assert score(build("roberta"), tokens, window=36, pll_positions=2).window == 36


def test_refuses_a_mask_token_of_another_tokenizer(tokens: torch.Tensor) -> None:
    with pytest.raises(CompressError, match="mask token id"):
        score(build("bert"), tokens, mask_token_id=101)
