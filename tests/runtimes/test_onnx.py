"""Results in onnxruntime: the same logits as in torch, on the same integers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

import compress
from compress.errors import CompressError
from compress.eval.cost import paired_latency
from compress.eval.quality.masked import masked_scores
from compress.eval.quality.perplexity import perplexity

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

# onnxruntime's attention takes heads of a multiple of 16.
SIZES = {
    **dict.fromkeys(("llama", "mistral", "qwen3"), {"head_dim": 16}),
    "qwen2": {"num_attention_heads": 2, "num_key_value_heads": 1},
    "bert": {},
}
RTN = {"method": "rtn", "group_size": 32}


@pytest.fixture
def pair(tiny, tokenizer, tokens, tmp_path):
    """``pair(family, *steps, **fields)``: a tiny model after steps, in torch and exported."""

    def make(family: str, *steps, activations: str = "float32", **fields):
        model = tiny(family, **{**SIZES[family], **fields})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a step that reaches a part of the model says so
            compress.apply(model, list(steps), tokens)
        folder = compress.save(model, tmp_path / "small", tokenizer)
        compress.export(folder, "onnx", tmp_path / "onnx", activations=activations)
        exported, read = compress.load(tmp_path / "onnx", runtime="onnx")
        assert read("text").input_ids == tokenizer("text").input_ids
        return model.eval(), exported

    return make


@pytest.mark.parametrize(
    "family, steps, fields",
    [
        ("llama", [{**RTN, "bits": 4, "symmetric": False}], {}),
        ("llama", [{**RTN, "bits": 3, "group_size": 16, "embeddings": 4}],
         {"tie_word_embeddings": True}),
        ("llama", [{"method": "ffn_width", "share": 0.4, "allocation": "per_layer"},
                   {"method": "head_width", "share": 0.5},
                   {"method": "shortgpt", "remove": 1}], {}),
        ("mistral", [{"method": "svd", "ratio": 0.5},
                     {"method": "rtn", "bits": 8, "group_size": None}], {}),
        ("qwen2", [{**RTN, "bits": 2, "embeddings": 8, "symmetric": False}], {}),
        ("qwen3", [{**RTN, "bits": 6}], {}),
    ],
)  # fmt: skip
def test_logits_and_greedy_continuations_are_those_of_torch(
    pair, helpers, tokens, family, steps, fields
):
    model, exported = pair(family, *steps, **fields)
    assert helpers.difference(exported(tokens).logits, helpers.logits(model, tokens)) < 1e-5
    prompt, options = tokens[:2, :9], {"max_new_tokens": 6, "do_sample": False}
    want = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert torch.equal(exported.generate(prompt, **options), want)


def test_inputs_may_be_rounded_too(pair, helpers, tokens):
    """W8A8 rounds each token as torch does; int8 activations of weight-only integers, blocks."""
    model, exported = pair("llama", "w8a8")
    difference = helpers.difference(exported(tokens).logits, helpers.logits(model, tokens))
    assert difference < 0.03  # where a sum in another order turns a rounding
    first = model.model.layers[0].self_attn.q_proj
    assert first.scheme.activation_bits == 8


def test_int8_activations_of_weight_only_integers_are_close(pair, helpers, tokens):
    model, exported = pair("llama", {**RTN, "bits": 4}, activations="int8")
    difference = helpers.difference(exported(tokens).logits, helpers.logits(model, tokens))
    assert 1e-4 < difference < 0.1


def test_the_graph_is_measured_like_a_model(pair, tokens):
    model, exported = pair("llama", {**RTN, "bits": 4})
    stream = tokens.flatten()
    here, there = (perplexity(m, stream, window=48) for m in (model, exported))
    assert there.nll == pytest.approx(here.nll, rel=1e-5)
    times = paired_latency(model, exported, prefill_tokens=16, decode_tokens=3, repeats=3)
    assert times.decode.speedup > 0


@pytest.mark.parametrize("steps", [[], [{"method": "rtn", "bits": 8, "group_size": None}]])
def test_masked_models(pair, helpers, tokens, steps):
    model, exported = pair("bert", {"method": "head_width", "share": 0.5}, *steps)
    mask = torch.ones_like(tokens)
    mask[0, 7:] = 0
    with torch.no_grad():
        want = model(input_ids=tokens, attention_mask=mask).logits
    got = exported(tokens, attention_mask=mask).logits
    assert helpers.difference(got[0, :7], want[0, :7]) < 1e-5
    assert helpers.difference(got[1:], want[1:]) < 1e-5
    options = {"mask_token_id": 6, "window": 24, "pll_positions": 8}
    here, there = (masked_scores(m, tokens.flatten(), **options) for m in (model, exported))
    assert there.pll == pytest.approx(here.pll, rel=1e-5)


def test_evaluate_tells_of_what_really_runs(pair, section, tmp_path):
    _, exported = pair("llama", {**RTN, "bits": 4})
    section = {**section, "latency": False}
    here = compress.evaluate(tmp_path / "small", section).after
    there = compress.evaluate(tmp_path / "onnx", section, runtime="onnx").after
    assert there.perplexity.nll == pytest.approx(here.perplexity.nll, rel=1e-5)
    assert there.model_class == "OnnxForCausalLM" and not there.cached
    assert there.cost.macs == here.cost.macs
    assert there.cost.size.parameters == here.cost.size.parameters
    assert there.cost.size.checkpoint_bytes == exported.bytes
    assert "onnxruntime" in there.cost.execution


def test_sampling_is_repeatable_and_stays_within_top_k(pair, tokens):
    _, exported = pair("llama")
    prompt = tokens[:3, :8]
    options = {"max_new_tokens": 5, "do_sample": True, "temperature": 2.0, "eos_token_id": []}
    one, two = (exported.generate(prompt, seed=3, top_p=0.9, **options) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, exported.generate(prompt, seed=4, top_p=0.9, **options))
    greedy = exported.generate(prompt, max_new_tokens=5, eos_token_id=[])
    assert torch.equal(exported.generate(prompt, seed=5, top_k=1, **options), greedy)
    ended = exported.generate(prompt, max_new_tokens=5, eos_token_id=int(greedy[0, 8]))
    assert (ended[0, 8:] == greedy[0, 8]).all()
    cold = exported.generate(prompt, max_new_tokens=5, eos_token_id=[], temperature=0.0)
    assert torch.equal(cold, greedy)  # nothing is drawn, so the temperature says nothing
    for wrong in ({"temperature": 0.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(CompressError, match=next(iter(wrong))):
            exported.generate(prompt, **{**options, **wrong})


def test_several_tokens_join_a_cache_in_all_rows(pair, tokens, helpers):
    _, exported = pair("llama")
    rows = tokens[:3, :12]
    begun = exported(rows[:, :7], use_cache=True)
    rest = exported(rows[:, 7:], past_key_values=begun.past_key_values, use_cache=True)
    whole = exported(rows).logits
    assert helpers.difference(rest.logits, whole[:, 7:]) < 1e-4
    assert rest.past_key_values.length == 12


def test_padding_and_unknown_options_are_not_swallowed(pair, tokens):
    _, exported = pair("llama")
    rows, mask = tokens[:2, :8], torch.ones(2, 8, dtype=torch.long)
    mask[1, 6:] = 0  # behind the text: of no influence on it
    logits = exported(rows, attention_mask=mask).logits
    assert torch.equal(logits, exported(rows).logits)
    for call in (exported.generate, exported):
        with pytest.raises(CompressError, match="without padding"):
            call(
                rows,
                attention_mask=mask.flip(1),
                **({} if call is exported else {"max_new_tokens": 1}),
            )
    with pytest.raises(CompressError, match="num_beams"):
        exported.generate(rows, num_beams=4)
    whole = exported.generate(
        rows, attention_mask=torch.ones_like(rows), max_new_tokens=3, eos_token_id=[]
    )
    ends = int(whole[0, 8])
    filled = exported.generate(rows, max_new_tokens=3, eos_token_id=ends, pad_token_id=1)
    assert filled[0, 8:].tolist() == [ends] + [1] * (filled.shape[1] - 9)


def test_embeddings_of_integers(checkpoint, helpers, tokens, tmp_path):
    for tied in (True, False):
        folder = checkpoint("llama", tie_word_embeddings=tied, head_dim=16)
        out = tmp_path / f"{tied}"
        made = compress.export(folder, "onnx", out, embeddings="8", activations="float32")
        plain = compress.export(folder, "onnx", tmp_path / f"plain-{tied}")
        assert made.bytes < plain.bytes
        exported, _ = compress.load(out, runtime="onnx")
        here, _ = compress.load(folder)
        assert helpers.difference(exported(tokens).logits, helpers.logits(here, tokens)) < 0.03


def refusal(model: Path, out: Path, **options) -> str:
    with pytest.raises(CompressError) as error:
        compress.export(model, "onnx", out, **options)
    assert not out.exists()
    return str(error.value)


def test_what_cannot_run_is_refused_and_nothing_is_written(checkpoint, tiny, tmp_path, tokens):
    assert "'gpt2'" in refusal(checkpoint("gpt2"), tmp_path / "out")
    assert "multiple of 16" in refusal(checkpoint("llama"), tmp_path / "out")
    assert "--type" in refusal(checkpoint("llama"), tmp_path / "out", type="Q4_0")
    model = tiny("llama")
    compress.apply(model, [{"method": "rtn", "bits": 4, "group_size": 8}])
    eights = compress.save(model, tmp_path / "eights")
    assert "group_size 16" in refusal(eights, tmp_path / "out")


def test_bad_input_to_an_exported_model(checkpoint, tokens, tmp_path):
    folder = tmp_path / "out"
    compress.export(checkpoint("llama", head_dim=16), "onnx", folder)
    exported, _ = compress.load(folder, runtime="onnx")
    with pytest.raises(CompressError, match="at most 128 tokens"):
        exported.generate(tokens[:1], max_new_tokens=120)
    with pytest.raises(CompressError, match="at most 128 tokens"):
        exported(torch.zeros(1, 129, dtype=torch.long))
    with pytest.raises(CompressError, match="Export the model first"):
        compress.load(checkpoint("llama"), runtime="onnx")
    for name, change, words in (
        ("model.onnx.data", lambda old: old[:-1], "cut short"),
        ("model.onnx", lambda old: old[:-1] + bytes([old[-1] ^ 1]), "cut short"),
        ("compress_onnx.json", lambda _old: b"{", "a description of the model"),
        ("compress_onnx.json", lambda _old: None, "Export the model first"),
    ):
        file = folder / name
        whole = file.read_bytes()
        changed = change(whole)
        file.unlink() if changed is None else file.write_bytes(changed)
        with pytest.raises(CompressError, match=words):
            compress.load(folder, runtime="onnx")
        file.write_bytes(whole)
    compress.load(folder, runtime="onnx")


def test_what_a_session_can_compute_is_not_in_the_file(tiny, tokenizer, tokens, tmp_path):
    """Scales that float16 holds are half as long; cosines and sines are not there at all."""
    found = {}
    for scales in ("float16", "stored"):
        model = tiny("llama", head_dim=16, max_position_embeddings=65536)
        compress.apply(model, [{**RTN, "bits": 4, "scales": scales}])
        folder = compress.save(model, tmp_path / scales, tokenizer)
        out = tmp_path / f"{scales}-onnx"
        compress.export(folder, "onnx", out, activations="float32")
        found[scales] = (out / "model.onnx.data").stat().st_size
        exported, _ = compress.load(out, runtime="onnx")
        with torch.no_grad():
            torch.testing.assert_close(exported(tokens).logits, model(tokens).logits)
        before, after = (p / "tokenizer.json" for p in (folder, out))
        assert json.loads(before.read_text()) == json.loads(after.read_text())
        assert after.stat().st_size <= before.stat().st_size
    assert found["float16"] < found["stored"] < 65536 * 8


@pytest.mark.parametrize("name, to", [("onnx", "onnx"), ("onnxruntime", "onnx"), ("gguf", "gguf")])
def test_a_missing_package_is_named(monkeypatch, checkpoint, tmp_path, name, to):
    import importlib.util

    find = importlib.util.find_spec
    absent = lambda n, *a: None if n == name else find(n, *a)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", absent)
    with pytest.raises(CompressError, match=f"pip install {name}"):
        compress.export(checkpoint("llama"), to, tmp_path / "out")
