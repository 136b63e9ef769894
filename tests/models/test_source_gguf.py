"""GGUF files become folders with the weights they stand for."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compress.errors import CompressError
from compress.models.sources.source import load_model, load_tokenizer, resolve
from compress.system.tensors import TensorIndex

gguf = pytest.importorskip("gguf")

CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def model(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=len(vocabulary()), tie_word_embeddings=tied,
        rms_norm_eps=1e-5, max_position_embeddings=128,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def vocabulary() -> list[str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return ["<|end|>", *bytes_to_unicode().values(), "he", "ll"]


def interleave(weight: numpy.ndarray, heads: int) -> numpy.ndarray:
    """The row order of llama.cpp: rotary pairs side by side, where transformers has halves."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path: Path, source: LlamaForCausalLM, quantise=None) -> dict[str, numpy.ndarray]:
    """Write a llama GGUF; returns the matrices it stands for, by transformers' names."""
    config, writer = source.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary())
    writer.add_token_types([3] + [1] * (config.vocab_size - 1))
    writer.add_token_merges(["h e", "l l"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template(CHAT)
    meant = {}
    for name, tensor in source.state_dict().items():
        stem = name.removesuffix(".weight")
        if stem == "lm_head" and config.tie_word_embeddings:
            continue
        array = tensor.numpy()
        if stem.startswith("model.layers."):
            _, _, block, part = stem.split(".", 3)
            target = f"blk.{block}.{NAMES[part]}"
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
            if NAMES[part] in heads:
                array = interleave(array, heads[NAMES[part]])
        else:
            target = {"model.embed_tokens": "token_embd", "model.norm": "output_norm",
                      "lm_head": "output"}[stem]  # fmt: skip
        kind = None
        if quantise is not None and array.ndim == 2:
            packed = gguf.quants.quantize(array, quantise)
            meant[target] = gguf.quants.dequantize(packed, quantise)
            array, kind = packed, quantise
        writer.add_tensor(f"{target}.weight", numpy.ascontiguousarray(array), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


@pytest.mark.parametrize("tied", [True, False])
def test_float_gguf_gives_the_model_back(tied, tmp_path):
    original = model(tied)
    write_gguf(tmp_path / "m.gguf", original)
    source = resolve(tmp_path / "m.gguf", cache_dir=tmp_path / "cache")
    assert source.kind == "gguf" and len(source.digest) == 64 and "dequantised" in source.notes[0]
    loaded = load_model(source)
    assert type(loaded) is LlamaForCausalLM
    assert loaded.config.tie_word_embeddings == tied
    assert getattr(loaded.config, "quantization_config", None) is None
    assert ("lm_head.weight" in TensorIndex.open(source.folder)) == (not tied)
    for name, tensor in original.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, original(ids).logits)
    assert loaded.generation_config.eos_token_id == 0


def test_a_gguf_that_lacks_tensors_is_refused(tmp_path, monkeypatch):
    add = gguf.GGUFWriter.add_tensor
    monkeypatch.setattr(
        gguf.GGUFWriter, "add_tensor",
        lambda self, name, *a, **k: None if "1.ffn_up" in name else add(self, name, *a, **k),
    )  # fmt: skip
    write_gguf(tmp_path / "m.gguf", model(tied=False))
    with pytest.raises(CompressError, match=r"none for 1 of them, model.layers.1.mlp.up_proj"):
        resolve(tmp_path / "m.gguf", cache_dir=tmp_path / "cache")


def test_quantised_gguf_gives_the_weights_it_stands_for(tmp_path):
    original = model(tied=False)
    meant = write_gguf(tmp_path / "m.gguf", original, gguf.GGMLQuantizationType.Q4_1)
    source = resolve(tmp_path, cache_dir=tmp_path / "cache")
    folder = source.folder
    assert source.shipped.bytes == (tmp_path / "m.gguf").stat().st_size
    assert source.shipped.format.startswith("GGUF, mostly Q4_1, 5")
    index = TensorIndex.open(folder)
    for name, key in (("blk.1.ffn_down", "model.layers.1.mlp.down_proj"), ("output", "lm_head")):
        written = index.get(f"{key}.weight")
        assert written.dtype == torch.float32
        assert torch.equal(written, torch.from_numpy(meant[name].copy()))
    query = interleave(index.get("model.layers.0.self_attn.q_proj.weight").numpy(), 4)
    assert numpy.array_equal(query, meant["blk.0.attn_q"])


def test_tokenizer_and_chat_template_are_kept(tmp_path):
    write_gguf(tmp_path / "m.gguf", model(tied=True))
    tokenizer, reason = load_tokenizer(resolve(tmp_path, cache_dir=tmp_path / "cache").folder)
    assert not reason
    ids = tokenizer("hello é", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == "hello é"
    assert vocabulary().index("he") in ids and vocabulary().index("ll") in ids
    assert tokenizer.apply_chat_template([{"content": "hi"}], tokenize=False) == "hi"


def test_made_once(tmp_path):
    write_gguf(tmp_path / "m.gguf", model(tied=True))
    first = resolve(tmp_path, cache_dir=tmp_path / "cache").folder
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert resolve(tmp_path, cache_dir=tmp_path / "cache").folder == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp


def test_truncated_gguf(tmp_path):
    write_gguf(tmp_path / "m.gguf", model(tied=True))
    whole = (tmp_path / "m.gguf").read_bytes()
    for keep in (len(whole) // 2, 400, 5):
        (tmp_path / "m.gguf").write_bytes(whole[:keep])
        with pytest.raises(CompressError, match="GGUF"):
            resolve(tmp_path / "m.gguf", cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_several_gguf_files_need_a_choice(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(CompressError, match="a.gguf, b.gguf"):
        resolve(tmp_path)
