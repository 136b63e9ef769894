"""Headers and configs of values that no model has: refused by name before anything is built."""

from __future__ import annotations

import json
import os
import struct
import time
from pathlib import Path

import pytest

import compress
from compress.errors import CompressError
from compress.models.sources.source import load_config, resolve
from compress.system.tensors_header import INDEX, SINGLE, read_header, read_weight_map

EMPTY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def header_file(folder: Path, header: object, body: bytes = bytes(4)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / SINGLE
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b"[1, 2]",
        {"a": {**EMPTY, "data_offsets": [0, 4, 4]}},
        {"a": {**EMPTY, "data_offsets": [0]}},
        {"a": {**EMPTY, "data_offsets": ["0", "4"]}},
        {"a": {**EMPTY, "data_offsets": [0.0, 4.0]}},
        {"a": {**EMPTY, "shape": [float("inf")]}},
        {"a": {**EMPTY, "shape": [float("nan")]}},
        {"a": {**EMPTY, "shape": [True]}},
        {"a": {**EMPTY, "shape": [-1, -1]}},
        {"a": {**EMPTY, "shape": "1"}},
        {"a": {**EMPTY, "dtype": "F128"}},
    ],
)
def test_headers(header, tmp_path):
    with pytest.raises(CompressError, match="intact"):
        read_header(header_file(tmp_path, header))


def test_weights_and_index_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / SINGLE)
    (tmp_path / INDEX).write_text("[" * 100_000)
    with pytest.raises(CompressError, match="FIFO"):
        read_header(tmp_path / SINGLE)
    with pytest.raises(CompressError, match="weight_map"):
        read_weight_map(tmp_path / INDEX)
    with pytest.raises(CompressError, match="FIFO"):
        resolve(tmp_path)


@pytest.mark.parametrize(
    "fields, word",
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_hidden_layers": 0}, "at least 1"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
        ({"head_dim": 0}, "head_dim"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"hidden_size": 128}, "as config.json promises"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0.0}}, "rope_theta"),
        ({"max_position_embeddings": 10**12}, "max_position_embeddings"),
        ({"hidden_act": "evil"}, "evil"),
        ({"pad_token_id": 10**6}, "built"),
        ({"architectures": "LlamaForCausalLM"}, "list of names"),
        ({"architectures": [5]}, "architectures"),
        ({"transformers_weights": "../other.safetensors"}, "transformers_weights"),
        ({"compressed_modules": [1]}, "compressed_modules"),
        ({"compressed_modules": {"99.mlp": {"kind": "low_rank", "rank": 2}}}, "99"),
        ({"compressed_modules": {"0.mlp": {"kind": "evil"}}}, "kind"),
        ({"compressed_modules": {"0.mlp": {"kind": "low_rank", "rank": "x"}}}, "rank"),
        ({"compress": "evil"}, "compress"),
        ({"compress": {"zeros": {"2:4": [1]}}}, "zeros"),
    ],
)
def test_configs(fields, word, own_checkpoint):
    folder = own_checkpoint("llama")
    path = folder / "config.json"
    kept = {k: v for k, v in json.loads(path.read_text()).items() if k != "layer_types"}
    path.write_text(json.dumps(kept | fields))
    start = time.monotonic()
    with pytest.raises(CompressError, match=word) as caught:
        compress.inspect(folder)
    assert time.monotonic() - start < 20 and len(str(caught.value)) < 1000


def test_config_of_brackets_only(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": ' + "[" * 100_000)
    with pytest.raises(CompressError, match="nested too deeply"):
        load_config(tmp_path)


def test_weights_of_integers(own_checkpoint):
    folder = own_checkpoint("llama")
    data = (folder / SINGLE).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    next(item for name, item in header.items() if "q_proj" in name)["dtype"] = "I32"
    header_file(folder, header, data[8 + length :])
    with pytest.raises(CompressError, match="floating-point"):
        compress.inspect(folder)


def test_models_that_cannot_be_trained_here():
    from compress.train.create import architecture
    from compress.train.create.spec import TrainSpec

    for fields, word in (
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"hidden_size": 2**20, "intermediate_size": 2**20}, "memory of this machine"),
        ({"hidden_size": 0}, "hidden_size"),
    ):
        section = {
            "architecture": {"model_type": "llama", "num_attention_heads": 2, **fields},
            "tokenizer": "bytes", "text": {"source": "x.txt"}, "length": 8,
            "training": {"steps": 1},
        }  # fmt: skip
        with pytest.raises(CompressError, match=word):
            architecture.build_config(TrainSpec.model_validate(section))


def test_tied_weights_that_differ(own_checkpoint, tmp_path):
    folder = own_checkpoint("llama")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    recipe = {"model": str(folder), "steps": ["magnitude"]}
    with pytest.raises(CompressError, match="tie_word_embeddings: false"):
        compress.run(recipe, tmp_path / "run")
