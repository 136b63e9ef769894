"""Results as GGUF files, read back by the reader that takes a GGUF file as a source."""

from __future__ import annotations

import warnings
from itertools import product
from pathlib import Path

import pytest
import torch

import compress
from compress.conformance.models import prose
from compress.errors import CompressError
from compress.linear.grid import (
    QuantScheme,
    dequantize,
    find_group_qparams,
    half_scale_bits,
    quantize,
)

VOCABULARY = 300

gguf = pytest.importorskip("gguf")

from compress.runtimes.gguf.blocks import TYPES, pack_grid, type_for  # noqa: E402
from compress.runtimes.weights import Grid  # noqa: E402


def grid_of(weight: torch.Tensor, scheme: QuantScheme, bits: int | None) -> Grid:
    scale, zero = find_group_qparams(weight, scheme, scale_bits=bits)
    zero = None if scheme.symmetric else zero
    return Grid(quantize(weight, scale, zero, scheme), scale, zero, scheme)


def export(model: Path | str, out: Path, **options):
    return compress.export(str(model), "gguf", out, **options)


@pytest.fixture(scope="module")
def words():
    """A byte-level BPE with merges: llama.cpp has none without."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
    )
    bpe.train_from_iterator([prose(3000, seed=1)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", chat_template="{{ messages }}"
    )


@pytest.fixture
def small(tiny, words, tokens, tmp_path):
    """``small(family, *steps, **fields)``: a folder with a tiny model after steps."""

    def make(family: str, *steps, folder: str = "small", **fields) -> Path:
        model = tiny(family, vocab_size=VOCABULARY, **fields)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a step that reaches a part of the model says so
            compress.apply(model, list(steps), tokens)
        return compress.save(model, tmp_path / folder, words)

    return make


@pytest.mark.parametrize("bits, symmetric", list(product(range(2, 9), (True, False)))[:-1])
def test_codes_and_float16_scales_are_carried_over_exactly(bits, symmetric):
    scheme = QuantScheme(bits=bits, symmetric=symmetric, group_size=64)
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(bits)) * 0.02
    grid = grid_of(weight, scheme, half_scale_bits(scheme))
    kind = type_for(scheme, 128, "auto", "w")
    packed, changed = pack_grid(grid, kind)
    back = torch.from_numpy(gguf.dequantize(packed, gguf.GGMLQuantizationType[kind]))
    assert changed == 0
    assert torch.equal(back, dequantize(grid.codes, grid.scale, grid.zero_point))
    assert packed.nbytes == 6 * 128 // 32 * TYPES[kind].bytes


def test_groups_too_small_for_float16_become_zeros():
    scheme = QuantScheme(bits=4, group_size=32)
    grid = grid_of(torch.randn(2, 64) * 1e-9, scheme, half_scale_bits(scheme))
    assert (grid.scale > 0).all()
    assert (dequantize(grid.codes, grid.scale, grid.zero_point) == 0).all()


def test_scales_that_are_no_float16_numbers_are_rounded_and_said_to_be():
    scheme = QuantScheme(bits=4, group_size=32)
    grid = grid_of(torch.randn(8, 64), scheme, None)
    packed, changed = pack_grid(grid, "Q4_0")
    back = torch.from_numpy(gguf.dequantize(packed, gguf.GGMLQuantizationType.Q4_0))
    want = dequantize(grid.codes, grid.scale)
    assert 0 < changed <= 2**-11
    torch.testing.assert_close(back, want, rtol=2**-11, atol=0)


@pytest.mark.parametrize(
    "scheme, columns, asked, words",
    [
        (QuantScheme(bits=8, group_size=32, symmetric=False), 64, "auto", "Q8_0 is the nearest"),
        (QuantScheme(bits=4, group_size=16), 64, "auto", "group_size 32"),
        (QuantScheme(bits=4), 48, "auto", "48 columns"),
        (QuantScheme(bits=5, group_size=32), 64, "Q4_0", "--type Q5_0"),
        (QuantScheme(bits=4, group_size=32, symmetric=False), 64, "Q4_0", "--type Q4_1"),
        (QuantScheme(bits=4, group_size=32), 64, "F16", "--type Q4_0"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused_with_the_nearest_type(scheme, columns, asked, words):
    with pytest.raises(CompressError, match=words):
        type_for(scheme, columns, asked, "w")


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_quantised_model_comes_back_as_it_is(small, helpers, tokens, tmp_path, family):
    """Q4_0, and Q8_0 for what a second step has quantised with more bits."""
    fields = {"hidden_size": 64}
    if family == "qwen3":  # the only size of heads that transformers' reader knows for it
        fields["head_dim"] = 128
    elif family != "qwen2":
        fields["head_dim"] = 16
    shared = {"method": "rtn", "scales": "float16"}
    tables = {"embeddings": 8} if family in ("llama", "qwen2") else {}
    fields["tie_word_embeddings"] = family == "llama"
    folder = small(
        family,
        {**shared, **tables, "bits": 4, "group_size": 32, "exclude": ["*down_proj"]},
        {**shared, "bits": 8, "group_size": None, "include": ["*down_proj"]},
        **fields,
    )
    made = export(folder, tmp_path / "small.gguf")
    assert made.scales_changed == 0 and not made.rounded
    rounded = {"llama": 1, "qwen2": 2}.get(family, 0)  # embedding and head
    assert made.types["Q4_0"] == 3 * 6 and made.types["Q8_0"] == 3 + rounded
    back, tokenizer = compress.load(made.file)
    here, own = compress.load(folder, packed=False)
    assert helpers.difference(helpers.logits(back, tokens), helpers.logits(here, tokens)) < 1e-5
    assert tokenizer("a text").input_ids == own("a text").input_ids
    assert tokenizer.chat_template == own.chat_template


def test_pruned_widths_and_depth_are_metadata(small, helpers, tokens, tmp_path):
    folder = small(
        "llama",
        {"method": "ffn_width", "share": 0.5, "round_to": 32},
        {"method": "head_width", "share": 0.5},
        hidden_size=64, head_dim=16,
    )  # fmt: skip
    made = export(folder, tmp_path / "small.gguf", type="Q8_0")
    assert len(made.rounded) == 2 + 3 * 7  # embedding and head follow
    fields = gguf.GGUFReader(made.file).fields
    assert fields["llama.feed_forward_length"].contents() == 32
    assert fields["llama.attention.head_count"].contents() == 2
    assert fields["llama.attention.key_length"].contents() == 16
    back, _ = compress.load(made.file)
    here, _ = compress.load(folder)
    assert helpers.difference(helpers.logits(back, tokens), helpers.logits(here, tokens)) < 0.05


@pytest.mark.parametrize("kind, tolerance", [("F32", 0), ("F16", 2e-3), ("BF16", 2e-2)])
def test_float_types(small, helpers, tokens, tmp_path, kind, tolerance):
    folder = small("llama")
    made = export(folder, tmp_path / "small.gguf", type=kind)
    back, here = compress.load(made.file)[0], compress.load(folder)[0]
    assert (
        helpers.difference(helpers.logits(back, tokens), helpers.logits(here, tokens)) <= tolerance
    )


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 32},
    ],
)  # fmt: skip
def test_scaled_rotary_frequencies(small, helpers, tokens, tmp_path, rope):
    folder = small("llama", head_dim=16, rope_parameters={**rope, "rope_theta": 100.0})
    made = export(folder, tmp_path / "small.gguf")
    back, here = compress.load(made.file)[0], compress.load(folder)[0]
    assert helpers.difference(helpers.logits(back, tokens), helpers.logits(here, tokens)) < 1e-6
    plain = compress.load(small("llama", head_dim=16, rope_parameters={"rope_theta": 100.0,
                                "rope_type": "default"}, folder="plain"))[0]  # fmt: skip
    assert helpers.difference(helpers.logits(plain, tokens), helpers.logits(here, tokens)) > 1e-3


def refusal(model: Path, out: Path, **options) -> str:
    with pytest.raises(CompressError) as error:
        export(model, out, **options)
    assert not list(out.parent.glob("*.gguf*")) and not list(out.parent.glob(".*gguf*"))
    return str(error.value)


def test_what_llama_cpp_cannot_run_is_refused_and_nothing_is_written(
    checkpoint, own_checkpoint, tmp_path, small
):
    out = tmp_path / "small.gguf"
    assert "'gpt2'" in refusal(checkpoint("gpt2"), out)
    assert "--no-tokenizer" in refusal(checkpoint("llama"), out)  # one without merges
    assert "one of auto, F32" in refusal(checkpoint("llama"), out, type="Q4_K")
    low_rank = small("llama", {"method": "svd", "ratio": 0.5})
    assert "compress materialize" in refusal(low_rank, out)
    damaged = own_checkpoint("llama")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in refusal(damaged, out, tokenizer=False)
    made = export(checkpoint("llama"), out, tokenizer=False)
    with pytest.raises(CompressError, match="not to exist yet"):
        export(checkpoint("llama"), made.file, tokenizer=False)


def test_widths_that_differ_between_layers_are_refused(checkpoint, tokens, tmp_path):
    model, _ = compress.load(checkpoint("llama"))
    compress.apply(
        model, [{"method": "ffn_width", "share": 0.4, "allocation": "per_layer"}], tokens
    )
    folder = compress.save(model, tmp_path / "uneven")
    assert "differ between layers" in refusal(folder, tmp_path / "x.gguf", tokenizer=False)
