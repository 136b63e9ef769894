"""Counts against arithmetic by hand; timing and memory against what must hold on any machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from compress.errors import CompressError
from compress.eval.cost import cost, macs_per_token, paired_latency, peak_memory, size
from compress.eval.cost.size import blocks_name, human_bytes

SHAPE = dict(
    vocab_size=200,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=64,
    max_position_embeddings=128,
)
BLOCK = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 64  # q, k, v, o and the three FFN matrices
NORMS = 5 * 32


@pytest.fixture
def llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True))


def test_tied_weights_count_once(llama: nn.Module) -> None:
    found = size(llama)
    assert found.parameters == llama.num_parameters() == 2 * BLOCK + NORMS + 200 * 32
    assert found.parameters_without_embeddings == 2 * BLOCK + NORMS
    assert found.block_weights == 2 * BLOCK
    assert found.checkpoint_bytes is None and found.bits_per_weight is None


def test_untied_head_is_not_counted_as_body() -> None:
    found = size(LlamaForCausalLM(LlamaConfig(**SHAPE)))
    assert found.parameters == 2 * BLOCK + NORMS + 2 * 200 * 32
    assert found.parameters_without_embeddings == 2 * BLOCK + NORMS


def test_zeros_are_seen(llama: nn.Module) -> None:
    with torch.no_grad():
        llama.model.layers[0].mlp.up_proj.weight[:, ::2] = 0
    found = size(llama)
    assert found.parameters - found.nonzero_parameters == 32 * 64 // 2
    assert found.block_weights - found.nonzero_block_weights == 32 * 64 // 2


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 32), (torch.bfloat16, 16)])
def test_bytes_and_bits_of_a_sharded_checkpoint(
    llama: nn.Module, tmp_path: Path, dtype: torch.dtype, bits: int
) -> None:
    llama.to(dtype).save_pretrained(tmp_path, max_shard_size="20KB")
    shards = list(tmp_path.glob("*.safetensors"))
    found = size(llama, tmp_path)
    assert len(shards) > 1
    assert found.checkpoint_bytes == sum(s.stat().st_size for s in shards)
    assert found.block_bytes == 2 * BLOCK * bits // 8
    assert found.bits_per_weight == bits


def test_packed_weights_count_unpacked(llama: nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    with torch.no_grad():
        llama.model.layers[0].mlp.up_proj.weight[:, ::2] = 0
    dense = size(llama)
    args = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=16)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    apply_quantization_config(llama, config)
    for module in llama.modules():
        if hasattr(module, "weight_scale"):
            groups = module.weight.detach().unflatten(1, (-1, 16))
            scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
            module.weight_scale.data.copy_(scale)
    compressor = ModelCompressor.from_pretrained_model(llama)
    compressor.compress_model(llama, skip_compressed=True)
    llama.save_pretrained(tmp_path)
    found = size(llama, tmp_path)
    assert found.parameters == dense.parameters
    assert found.block_weights == 2 * BLOCK
    # Rounding makes more zeros, never fewer.
    assert found.block_weights // 4 < found.nonzero_block_weights <= dense.nonzero_block_weights
    # 4 bits, a float32 scale for every 16 weights, and 16 bytes of shape per matrix.
    shapes = 14 * 8 * 16
    assert found.bits_per_weight == pytest.approx(4 + 32 / 16 + shapes / found.block_weights)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_macs_by_hand(attention: str) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation=attention))
    found = macs_per_token(model, context=100)
    products = 2 * 2 * 4 * 8  # layers, both products, heads, head width
    assert found.per_token_and_position == products
    assert found.head == 200 * 32
    assert found.per_token == 2 * BLOCK + 200 * 32 + 100 * products


def test_macs_of_a_model_with_few_positions() -> None:
    shape = {"vocab_size": 200, "n_embd": 32, "n_layer": 2, "n_head": 4}
    few, many = (GPT2LMHeadModel(GPT2Config(**shape, n_positions=n)) for n in (6, 64))
    assert macs_per_token(few, context=6) == macs_per_token(many, context=6)


def test_macs_of_conv1d_and_of_shared_layers() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=200, n_embd=32, n_layer=2, n_head=4))
    assert macs_per_token(gpt2, 0 + 1).per_token == 2 * 12 * 32 * 32 + 200 * 32 + 2 * 2 * 32
    shape = {k: v for k, v in SHAPE.items() if k != "num_key_value_heads"}
    shared = [
        macs_per_token(AlbertForMaskedLM(AlbertConfig(**{**shape, "num_hidden_layers": n})), 1)
        for n in (2, 4)
    ]
    # Two more passes through the one shared block.
    assert shared[1].per_token - shared[0].per_token == 2 * (4 * 32**2 + 2 * 32 * 64 + 2 * 32)


def test_blocks_are_the_outermost_longest_list(llama: nn.Module) -> None:
    assert blocks_name(llama) == "model.layers"
    llama.model.layers[0].experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))
    assert blocks_name(llama) == "model.layers"


def test_missing_and_broken_checkpoints(llama: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="safetensors checkpoint"):
        size(llama, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(CompressError, match="broken header"):
        size(llama, tmp_path)
    index = {"weight_map": {"a": "../elsewhere.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CompressError, match=r"no elsewhere\.safetensors in"):
        size(llama, tmp_path)


def test_human_bytes() -> None:
    assert [human_bytes(n) for n in (0, 999, 1000, 269_060_552)] == [
        "0 B",
        "999 B",
        "1 kB",
        "269 MB",
    ]


class TestLatency:
    def test_a_deeper_model_is_slower(self) -> None:
        shape = {**SHAPE, "hidden_size": 64}
        deep = LlamaForCausalLM(LlamaConfig(**{**shape, "num_hidden_layers": 8}))
        shallow = LlamaForCausalLM(LlamaConfig(**{**shape, "num_hidden_layers": 1}))
        deep.train()
        found = paired_latency(deep, shallow, prefill_tokens=64, decode_tokens=4, repeats=9)
        for timed in (found.prefill, found.decode):
            # The fastest of nine: the machine may be busy with something else.
            assert min(timed.before_seconds) > 1.3 * min(timed.after_seconds)
            low, high = timed.interval
            assert low <= timed.speedup <= high
            assert len(timed.before_seconds) == len(timed.after_seconds) == 9
        assert deep.training

    def test_masked_models_have_no_decode(self) -> None:
        shape = {k: v for k, v in SHAPE.items() if k != "num_key_value_heads"}
        bert = BertForMaskedLM(BertConfig(**shape))
        assert paired_latency(bert, bert, prefill_tokens=8, repeats=3).decode is None

    def test_refusals(self, llama: nn.Module) -> None:
        with pytest.raises(CompressError, match="3 repeats"):
            paired_latency(llama, llama, repeats=1)
        with pytest.raises(CompressError, match="128 positions"):
            paired_latency(llama, llama, prefill_tokens=128, decode_tokens=1)


def test_peak_memory_is_that_of_the_child(llama: nn.Module, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path)
    hoard = torch.ones(1_000_000_000, dtype=torch.int8)  # the child must not inherit this peak
    found = cost(llama, tmp_path, context=64, prefill_tokens=32).memory
    assert 0 < found.libraries <= found.load <= found.prefill < len(hoard)
    assert found.tokens == 32


def test_peak_memory_reports_why_a_folder_does_not_load(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(CompressError, match="fresh process.*exit status 1"):
        peak_memory(tmp_path)
