"""Checkpoints by their headers: what is read, and what is refused before anything is read."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compress.errors import CompressError
from compress.system.tensors import TensorIndex, check_finite, file_sha256
from compress.system.tensors_header import INDEX, SINGLE


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(6, 4, generator=generator),
        "b.weight": torch.randn(3, 5, generator=generator).to(torch.bfloat16),
        "c.ids": torch.arange(7),
        "d.scalar": torch.tensor(2.5),
        "e.flags": torch.tensor([True, False, True]),
        "f.empty": torch.empty(0, 4),
        "g.float8": torch.randn(5, generator=generator).to(torch.float8_e4m3fn),
    }


@pytest.fixture
def single(tmp_path: Path, tensors) -> Path:
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path, tensors) -> Path:
    weight_map = {}
    every = list(tensors)
    for number, names in enumerate((every[::2], every[1::2]), 1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, tmp_path / shard)
        weight_map |= dict.fromkeys(names, shard)
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_reads_what_was_written(layout, tensors, request):
    index = TensorIndex.open(request.getfixturevalue(layout))
    assert sorted(index.names()) == sorted(tensors) and len(index) == len(tensors)
    for name, tensor in tensors.items():
        assert name in index
        assert index.shape(name) == tuple(tensor.shape)
        assert index.dtype(name) == tensor.dtype
        assert index.nbytes(name) == tensor.numel() * tensor.element_size()
        assert index.file(name).exists()
        read = index.get(name)
        assert read.dtype == tensor.dtype and read.shape == tensor.shape
        assert torch.equal(read.double(), tensor.double())
    assert index.total_bytes() == sum(t.numel() * t.element_size() for t in tensors.values())
    asked = ["b.weight", "a.weight"]
    read = index.get_many(asked, dtype=torch.float32)
    assert list(read) == asked
    assert read["b.weight"].dtype == torch.float32
    assert torch.equal(read["b.weight"], tensors["b.weight"].float())


def test_unknown_name_proposes_the_closest(single):
    with pytest.raises(CompressError, match=r"Did you mean 'a\.weight'"):
        TensorIndex.open(single).get("a.weigth")


def test_digest_follows_the_content(single, tensors):
    before = TensorIndex.open(single).digest()
    assert before == TensorIndex.open(single).digest() and len(before) == 64
    tensors["a.weight"][0, 0] += 1
    save_file(tensors, single / SINGLE, metadata={"format": "pt"})
    assert TensorIndex.open(single).digest() != before


def test_file_sha256_is_the_standard_one(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert file_sha256(tmp_path / "x").startswith("ba7816bf8f01cfea414140de5dae2223")


def test_thousands_of_tensors_open_quickly(tmp_path):
    save_file({f"t{i}": torch.zeros(2) for i in range(5000)}, tmp_path / SINGLE)
    start = time.perf_counter()
    assert len(TensorIndex.open(tmp_path)) == 5000
    assert time.perf_counter() - start < 1.0


def refused(folder: Path, match: str) -> None:
    with pytest.raises(CompressError, match=match):
        TensorIndex.open(folder)


def test_truncated_file(single):
    whole = (single / SINGLE).read_bytes()
    for keep in (len(whole) - 1, len(whole) // 2):
        (single / SINGLE).write_bytes(whole[:keep])
        refused(single, "truncated")
    for keep in (0, 5):
        (single / SINGLE).write_bytes(whole[:keep])
        refused(single, "corrupt|truncated")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data[:8] + b"{{" + data[10:],
        lambda data: data + b"extra",
        lambda data: data.replace(b'"shape":[6,4]', b'"shape":[6,5]'),
        lambda data: data.replace(b'"F32"', b'"F99"', 1),
        lambda data: b"<!DOCTYPE html><html>not found</html>",
    ],
    ids=["length", "json", "trailing", "shape", "dtype", "html"],
)
def test_corrupt_file(single, damage):
    whole = (single / SINGLE).read_bytes()
    damaged = damage(whole)
    assert damaged != whole
    (single / SINGLE).write_bytes(damaged)
    refused(single, "corrupt")


def test_missing_shard(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    refused(sharded, "model-00002-of-00002.safetensors")


def test_index_names_a_tensor_its_shard_lacks(sharded):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["ghost.weight"] = "model-00001-of-00002.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, "ghost.weight")


@pytest.mark.parametrize("text", ["not json", "{}", '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_corrupt_index(sharded, text):
    (sharded / INDEX).write_text(text)
    refused(sharded, "corrupt")


@pytest.mark.parametrize(
    "shard", ["../other.safetensors", "/etc/passwd", "x\\y.safetensors", "a.bin", 3]
)
def test_index_cannot_reach_out_of_the_folder(sharded, shard):
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    refused(sharded, "no safetensors file beside it")


def test_no_weights(tmp_path):
    refused(tmp_path / "nowhere", "a folder")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "weights")


def test_shards_without_index(sharded):
    (sharded / INDEX).unlink()
    refused(sharded, "index")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickles_are_refused_with_the_way_to_convert(tmp_path, name):
    torch.save({"w": torch.ones(2)}, tmp_path / name)
    with pytest.raises(CompressError) as caught:
        TensorIndex.open(tmp_path)
    message = str(caught.value)
    assert name in message and "from_pretrained" in message and "save_pretrained" in message
    assert "isolated" in message


def test_pickle_beside_safetensors_is_no_obstacle(single, tensors):
    torch.save({}, single / "pytorch_model.bin")
    assert len(TensorIndex.open(single)) == len(tensors)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite_are_named(tmp_path, value, dtype):
    good, bad = torch.ones(4, 4, dtype=dtype), torch.ones(4, 4, dtype=dtype)
    bad[1, 2] = value
    save_file({"good": good, "bad": bad, "ids": torch.arange(3)}, tmp_path / SINGLE)
    index = TensorIndex.open(tmp_path)
    index.check_finite(["good", "ids"])
    with pytest.raises(CompressError, match="1 NaN or infinite values of 16 in bad"):
        index.check_finite(index.names())


def test_large_finite_values_are_finite():
    # Their sum overflows, which must not be taken for a damaged tensor.
    check_finite("w", torch.full((8,), 3e38))
    check_finite("h", torch.full((8,), 6e4, dtype=torch.float16))


def test_file_that_shrinks_after_opening(single):
    index = TensorIndex.open(single)
    path = single / SINGLE
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CompressError, match="has changed since"):
        index.get_many(index.names())


def test_reading_leaves_nothing_resident(tmp_path):
    psutil = pytest.importorskip("psutil")
    megabytes = 2**18  # float32 values
    save_file({f"t{i}": torch.ones(16 * megabytes) for i in range(8)}, tmp_path / SINGLE)
    index = TensorIndex.open(tmp_path)
    index.get("t0")
    before = psutil.Process().memory_info().rss
    for name in index.names():
        assert float(index.get(name)[-1]) == 1
    assert psutil.Process().memory_info().rss - before < 40 * 2**20  # of 128 MiB read
