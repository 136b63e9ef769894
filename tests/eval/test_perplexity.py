"""Perplexity agrees with the plain forward in every family and refuses what it cannot measure."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    OPTConfig,
    OPTForCausalLM,
)

import compress.models.split_forward as split_forward
from compress.errors import CompressError
from compress.eval.quality.perplexity import PerplexityResult, perplexity

VOCABULARY = 211
SHAPE = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=64,
)
GROUPED = dict(**SHAPE, num_key_value_heads=2)
GPT2 = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64)
OPT = OPTConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    word_embed_proj_dim=16,
    ffn_dim=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
)
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2),
    "opt": lambda: OPTForCausalLM(OPT),
    "gemma2 (soft cap)": lambda: Gemma2ForCausalLM(
        Gemma2Config(**GROUPED, head_dim=8, final_logit_softcapping=0.5)
    ),
    "cohere (logit scale)": lambda: CohereForCausalLM(CohereConfig(**GROUPED, logit_scale=3.0)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE)),
}


def build(family: str) -> nn.Module:
    torch.manual_seed(0)
    model = FAMILIES[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # away from the uniform prediction of a fresh model
    return model


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(VOCABULARY, (300,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def llama() -> nn.Module:
    return build("llama")


def plain_nll(model: nn.Module, window: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits = model.eval()(input_ids=window[None]).logits[0].float()
    return nn.functional.cross_entropy(logits[:-1], window[1:], reduction="none").double()


@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_the_plain_forward(
    family: str, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split_forward, "CHUNK_BYTES", 4 * VOCABULARY * 7)  # 7 positions a chunk
    model = build(family)
    result = perplexity(model, tokens, window=64, batch_size=3)
    windows = [plain_nll(model, tokens[s : s + 64]) for s in range(0, 300 - 63, 64)]
    assert result.window_nll == pytest.approx([w.mean().item() for w in windows], rel=1e-5)
    assert result.nll == pytest.approx(torch.cat(windows).mean().item(), rel=1e-5)
    assert result.tokens == 4 * 63
    assert result.interval[0] < result.perplexity == math.exp(result.nll) < result.interval[1]


def test_overlapping_windows_predict_each_token_once(llama: nn.Module, tokens) -> None:
    result = perplexity(llama, tokens[:100], window=40, stride=20)
    expected = [plain_nll(llama, tokens[:40])]
    expected += [plain_nll(llama, tokens[s : s + 40])[-20:] for s in (20, 40, 60)]
    assert result.tokens == 99
    assert result.nll == pytest.approx(torch.cat(expected).mean().item(), rel=1e-5)


def test_bits_per_byte_charges_the_whole_text(llama: nn.Module, tokens) -> None:
    result = perplexity(llama, tokens[:128], window=64, bytes_count=512)
    assert result.bits_per_byte == pytest.approx(result.nll / math.log(2) * 128 / 512)


def test_one_window_has_no_interval(llama: nn.Module, tokens) -> None:
    result = perplexity(llama, tokens[:64], window=64)
    assert result.interval is None
    assert PerplexityResult.model_validate_json(result.model_dump_json()) == result


def test_leaves_the_model_as_it_was(llama: nn.Module, tokens) -> None:
    llama.train()
    before = {name: dict(module.__dict__) for name, module in llama.named_modules()}
    perplexity(llama, tokens, window=64)
    assert llama.training
    with torch.no_grad():
        llama.lm_head.weight[0, 0] = math.nan
    with pytest.raises(CompressError, match="NaN"):
        perplexity(llama, tokens, window=64)
    for name, module in llama.named_modules():
        assert module.__dict__.keys() == before[name].keys()
    assert llama.training


def test_the_head_never_sees_a_whole_window(llama: nn.Module, tokens, monkeypatch) -> None:
    monkeypatch.setattr(split_forward, "CHUNK_BYTES", 4 * VOCABULARY * 5)
    sizes = []
    llama.lm_head.register_forward_hook(lambda _m, _i, out: sizes.append(out.numel()))
    perplexity(llama, tokens, window=64)
    assert max(sizes) <= 16 * VOCABULARY  # the first chunk is 16 positions, the others 5
    assert len(sizes) > 40


def test_progress_reaches_its_end(llama: nn.Module, tokens) -> None:
    seen = []
    perplexity(llama, tokens, window=64, batch_size=3, progress=lambda *p: seen.append(p))
    assert seen == [(3, 4), (4, 4)]


class TestRefusals:
    def test_too_short_a_text(self, llama: nn.Module, tokens) -> None:
        with pytest.raises(CompressError, match="one window of 64 tokens, got 10 tokens"):
            perplexity(llama, tokens[:10], window=64)

    @pytest.mark.parametrize("bad", [VOCABULARY, -1])
    def test_a_tokenizer_that_does_not_fit(self, llama: nn.Module, tokens, bad: int) -> None:
        tokens[5] = bad
        with pytest.raises(CompressError, match="tokenizer that does not fit"):
            perplexity(llama, tokens, window=64)

    def test_more_positions_than_the_model_has(self, tokens) -> None:
        with pytest.raises(CompressError, match="64 positions"):
            perplexity(build("gpt2"), tokens, window=100)

    @pytest.mark.parametrize(("window", "stride"), [(1, 1), (64, 65), (64, 0)])
    def test_windows_that_make_no_sense(self, llama: nn.Module, tokens, window, stride) -> None:
        with pytest.raises(CompressError, match="stride between 1 and the window"):
            perplexity(llama, tokens, window=window, stride=stride)

    def test_a_masked_model(self, tokens) -> None:
        with pytest.raises(CompressError, match=r"compress\.eval\.quality\.masked"):
            perplexity(BertForMaskedLM(BertConfig(**SHAPE)), tokens, window=64)

    def test_a_model_that_sees_the_future(self, tokens) -> None:
        config = BertConfig(**SHAPE)
        with pytest.raises(CompressError, match="a later token"):
            perplexity(BertLMHeadModel(config), tokens, window=64)
        config.is_decoder = True
        assert perplexity(BertLMHeadModel(config), tokens, window=64).perplexity > 1

    def test_a_model_without_a_head(self, tokens) -> None:
        with pytest.raises(CompressError, match="AutoModelForCausalLM"):
            perplexity(LlamaModel(LlamaConfig(**GROUPED)), tokens, window=64)
