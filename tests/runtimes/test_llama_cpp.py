"""A GGUF file in llama.cpp behind the face of a transformers model, where it is installed."""

from __future__ import annotations

import pytest
import torch

import compress
from compress.errors import CompressError
from compress.eval.cost import paired_latency
from compress.eval.quality.continuations import continuations
from compress.eval.quality.perplexity import perplexity

pytest.importorskip("llama_cpp")

from compress.runtimes.gguf.model import LlamaCppForCausalLM  # noqa: E402


def test_it_is_measured_like_a_model(checkpoint, tokens, helpers, tmp_path):
    folder = checkpoint("llama", head_dim=16)
    file = tmp_path / "tiny.gguf"
    compress.export(folder, "gguf", file, type="F32", tokenizer=False)
    here, tokenizer = compress.load(folder)
    there = LlamaCppForCausalLM(file, here.config, context=96)
    with torch.no_grad():  # its cache is in float16
        assert helpers.difference(there(tokens).logits, here(tokens).logits) < 2e-3
    stream = tokens.flatten()
    one, other = (perplexity(m, stream, window=48).nll for m in (here, there))
    assert other == pytest.approx(one, rel=1e-3)
    told = [continuations(m, tokenizer, stream, 3) for m in (here, there)]
    assert [c.prompt for c in told[0]] == [c.prompt for c in told[1]]
    times = paired_latency(here, there, prefill_tokens=16, decode_tokens=3, repeats=3)
    assert times.decode.speedup > 0 and there.bytes == file.stat().st_size
    assert "llama-cpp-python" in there.execution
    with pytest.raises(CompressError, match="at most 96 tokens"):
        there(torch.zeros(1, 97, dtype=torch.long), use_cache=True)
    with pytest.raises(CompressError, match="one row"):
        there(tokens[:2], use_cache=True)
    with pytest.raises(CompressError, match="without padding"):
        there(tokens[:1], attention_mask=torch.zeros_like(tokens[:1]), use_cache=True)


def test_a_file_that_was_cut_short_is_refused(checkpoint, tmp_path):
    folder = checkpoint("llama", head_dim=16)
    file = tmp_path / "tiny.gguf"
    compress.export(folder, "gguf", file, tokenizer=False)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CompressError, match="may have been cut short"):
        LlamaCppForCausalLM(file, compress.load(folder)[0].config, context=32)
