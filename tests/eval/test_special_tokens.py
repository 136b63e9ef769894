"""Reported figures have the tokenizer's special tokens, and equal a computation by hand."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch

import compress
from compress.errors import CompressError
from compress.eval import EvaluationSpec, evaluate
from compress.eval.quality.masked import masked_scores
from compress.eval.quality.perplexity import perplexity

BOS, CLS, SEP, MASK = 1, 4, 5, 6


@pytest.fixture
def stream() -> torch.Tensor:
    return torch.randint(7, 263, (200,), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def by_hand(model, stream: torch.Tensor, window: int) -> float:
    """Perplexity of windows behind BOS; a window's first token is context."""
    rows = stream[: len(stream) // window * window].view(-1, window)
    ids = torch.cat([torch.full((len(rows), 1), BOS), rows], dim=1)
    logs = model(input_ids=ids[:, :-1]).logits[:, 1:].double().log_softmax(-1)
    return math.exp(-float(logs.gather(2, rows[:, 1:, None]).mean()))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_perplexity_behind_bos(tiny, stream, family):
    model = tiny(family)
    found = perplexity(model, stream, prefix=[BOS], window=32)
    assert found.perplexity == pytest.approx(by_hand(model, stream, 32), rel=1e-5)
    plain = perplexity(model, stream, window=32)
    assert plain.perplexity != found.perplexity
    # The same tokens are predicted either way.
    assert (plain.tokens, plain.special_tokens) == (found.tokens, 0) == (6 * 31, 0)
    assert found.special_tokens == 1


def test_positions_with_bos(tiny, stream):
    model = tiny("llama")  # of 128 positions; the last token of a window is not run
    assert perplexity(model, stream, prefix=[BOS], window=128).tokens == 127
    with pytest.raises(CompressError, match=r"1 special ones.*128 or less"):
        perplexity(model, stream, prefix=[BOS], window=129)


def test_evaluate_asks_the_tokenizer(tiny, framing_tokenizer, stream):
    model, tokenizer = tiny("llama"), framing_tokenizer("[BOS] $A")
    spec = EvaluationSpec(perplexity={}, window=32, latency=False, memory=False)
    found = evaluate(model, tokenizer, spec, tokens=stream).perplexity
    assert found.perplexity == pytest.approx(by_hand(model, stream, 32), rel=1e-5)
    off = spec.model_copy(update={"special_tokens": False})
    assert evaluate(model, tokenizer, off, tokens=stream).perplexity.special_tokens == 0


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_masked_documents_one_at_a_time(tiny, stream, family):
    model = tiny(family)
    documents = [stream[:9], stream[9:12], stream[12:60], stream[60:61]]
    found = masked_scores(
        model, documents, mask_token_id=MASK, prefix=[CLS], suffix=[SEP], window=20,
        pll_positions=100, batch_size=3,
    )  # fmt: skip
    assert (found.packing, found.special_tokens, found.pll_positions) == ("documents", 2, 33)
    nats = 0.0
    for document in documents:
        kept = document[:20]
        ids = torch.cat([torch.tensor([CLS]), kept, torch.tensor([SEP])]).repeat(len(kept), 1)
        places = torch.arange(len(kept))
        ids[places, places + 1] = MASK
        with torch.no_grad():
            logs = model(input_ids=ids).logits.double().log_softmax(-1)
        nats -= float(logs[places, places + 1, kept].sum())
    assert -found.pll == pytest.approx(nats / 33, rel=1e-4)
    # One masked token each of 9, 3 and 1; 3 of the 20 that are left of 48.
    assert found.masked_positions == 1 + 1 + 1 + 3


def test_a_run_says_what_stands_around(own_checkpoint, framing_tokenizer, text, helpers, tmp_path):
    source = own_checkpoint("llama")
    framing_tokenizer("[BOS] $A").save_pretrained(source)
    recipe = helpers.recipe(
        source, [{"method": "wanda"}], text, evaluation=helpers.evaluation(text)
    )
    result = compress.run(recipe, tmp_path / "run")
    assert [entry.detail.rpartition("; ")[2] for entry in result.report.data] == [
        "[BOS] in front of each window"
    ] * 2
    before = result.report.before.perplexity
    assert before.special_tokens == 1
    assert compress.run(recipe, tmp_path / "run").report.before.perplexity == before
    # A folder that was told otherwise does not go on.
    bare = copy.deepcopy(recipe)
    bare["calibration"]["special_tokens"] = False
    with pytest.raises(CompressError, match="special_tokens"):
        compress.run(bare, tmp_path / "run")
    # One from before the option came put nothing around its windows, and does so to the end.
    resolved = tmp_path / "run" / "recipe.yaml"
    lines = resolved.read_text().splitlines(keepends=True)
    old = [line for line in lines if "special_tokens" not in line and "packing" not in line]
    resolved.write_text("".join(old))
    assert compress.run(bare, tmp_path / "run").report.before.perplexity == before


def test_masked_documents_in_a_run(own_checkpoint, framing_tokenizer, helpers, tmp_path):
    source, lines = own_checkpoint("bert"), tmp_path / "lines.jsonl"
    framing_tokenizer("[CLS] $A [SEP]").save_pretrained(source)
    texts = [f"number {i} of these lines" * (1 + i % 2) for i in range(20)]
    lines.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    recipe = helpers.recipe(source, [{"method": "sparsegpt"}], lines)
    recipe["calibration"] |= {"packing": "documents", "batch": 4}
    recipe["evaluation"] = helpers.evaluation(lines, packing="documents")
    found = compress.run(recipe, tmp_path / "run").report
    assert found.before.masked.packing == "documents" and found.before.masked.special_tokens == 2
    assert all(e.detail.endswith("[CLS] in front of and [SEP] behind each document")
               for e in found.data)  # fmt: skip


def test_texts_have_one_bos_in_lm_eval(tiny, framing_tokenizer, text):
    lm_eval = pytest.importorskip("lm_eval.api.instance")
    from compress.eval.quality.causal_lm import CausalLM

    model, tokenizer = tiny("llama"), framing_tokenizer("[BOS] $A")
    words = text.read_text()[:60]
    harness = CausalLM(pretrained=model, backend="causal", tokenizer=tokenizer, max_length=100)
    assert harness.tok_encode(words)[0] == BOS  # of a prompt
    asked = lm_eval.Instance("loglikelihood_rolling", {}, (words,), 0)
    found = harness.loglikelihood_rolling([asked], disable_tqdm=True)[0]
    ids = torch.tensor([BOS, *tokenizer(words, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        logs = model(input_ids=ids[None, :-1]).logits[0].log_softmax(-1)
    assert found == pytest.approx(float(logs.gather(1, ids[1:, None]).sum()), rel=1e-4)
    assert harness.tok_encode(words)[0] == BOS
