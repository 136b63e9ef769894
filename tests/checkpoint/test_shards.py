"""Checkpoint files: what was announced is what is there, whole or not at all."""

from __future__ import annotations

import errno
import json
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.checkpoint.save import save_model, verify
from compress.errors import CompressError
from compress.system import shards
from compress.system.shards import ShardWriter, TensorSpec, assemble

TENSORS = {
    "a": torch.arange(7, dtype=torch.int8),
    "b": torch.randn(3, 5),
    "c": torch.randn(4, 2).bfloat16(),
    "d": torch.tensor([3, 4]),
    "e": torch.zeros(0, 3),
    "f": torch.tensor(2.5),
}
SPECS = {name: TensorSpec.of(tensor) for name, tensor in TENSORS.items()}


def same(loaded):
    return loaded.keys() == TENSORS.keys() and all(
        loaded[n].dtype == TENSORS[n].dtype and torch.equal(loaded[n], TENSORS[n]) for n in TENSORS
    )


def test_single_file_in_any_order_of_writing(tmp_path):
    with ShardWriter(tmp_path / "out", SPECS) as writer:
        for name in reversed(TENSORS):
            writer.write(name, TENSORS[name])
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert same(load_file(tmp_path / "out" / "model.safetensors"))


def test_shards_and_their_index(tmp_path):
    with ShardWriter(tmp_path, SPECS, max_shard_bytes=70) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
    loaded = {}
    for name, file in index["weight_map"].items():
        loaded[name] = load_file(tmp_path / file)[name]
    assert same(loaded) and len(set(index["weight_map"].values())) == 2


def test_sharded_models_open(tiny, tmp_path):
    model = tiny.change(tiny.build("llama"), "narrower, low rank, W4")
    save_model(model, tmp_path / "out", max_shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    verify(tmp_path / "out", tiny.logits(model), tiny.inputs(), tiny.auto_class("llama"))


def test_assembled_parts_are_one_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "COPY_BYTES", 8)
    save_file({"a": TENSORS["a"], "b": TENSORS["b"]}, tmp_path / "one.safetensors")
    save_file({n: TENSORS[n] for n in "cdef"}, tmp_path / "two.safetensors")
    assemble(
        [(tmp_path / "one.safetensors", "x.0."), (tmp_path / "two.safetensors", "x.1.")],
        tmp_path / "out",
    )
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert same({name.rpartition(".")[2]: tensor for name, tensor in loaded.items()})
    assert {n.rpartition(".")[0] for n in loaded} == {"x.0", "x.1"}


def test_one_name_twice_is_refused(tmp_path):
    save_file({"a": TENSORS["a"]}, tmp_path / "one.safetensors")
    with pytest.raises(CompressError, match="a again"):
        assemble([(tmp_path / "one.safetensors", "")] * 2, tmp_path / "out")


def test_a_truncated_part_is_refused_before_anything_is_written(tmp_path):
    save_file({"b": TENSORS["b"]}, tmp_path / "one.safetensors")
    whole = (tmp_path / "one.safetensors").read_bytes()
    (tmp_path / "one.safetensors").write_bytes(whole[:-9])
    with pytest.raises(CompressError, match="truncated"):
        assemble([(tmp_path / "one.safetensors", "")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_part_that_shrinks_meanwhile_leaves_nothing(tmp_path, monkeypatch):
    save_file({"b": TENSORS["b"]}, tmp_path / "one.safetensors")
    monkeypatch.setattr(shards, "_read_pieces", lambda file, begin, end: [b"short"])
    with pytest.raises(CompressError, match="60 bytes of b, got 5"):
        assemble([(tmp_path / "one.safetensors", "")], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


class _FullDisk:
    """A file on a disk that fills up after so many writes."""

    def __init__(self, file, writes):
        self.file, self.left = file, writes

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *exc):
        return self.file.__exit__(*exc)

    def write(self, data):
        if self.left == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.left -= 1
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("writes", [0, 1, 3])
def test_a_disk_that_fills_up_is_told_and_nothing_stays(tmp_path, monkeypatch, writes):
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"what was there")
    real_open = type(out).open
    monkeypatch.setattr(
        type(out), "open", lambda path, mode="r": _FullDisk(real_open(path, mode), writes)
    )
    with pytest.raises(CompressError, match="bytes of free disk"), ShardWriter(out, SPECS) as w:
        for name, tensor in TENSORS.items():
            w.write(name, tensor)
    assert [p.name for p in out.iterdir()] == ["model.safetensors"]
    assert (out / "model.safetensors").read_bytes() == b"what was there"


def test_too_little_room_is_told_beforehand(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(100, 90, 10))
    with pytest.raises(CompressError, match="got 10"), ShardWriter(tmp_path / "out", SPECS):
        raise AssertionError("entered without room")
    assert not (tmp_path / "out").exists()


def test_an_error_while_writing_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), ShardWriter(tmp_path, SPECS) as writer:
        writer.write("a", TENSORS["a"])
        raise KeyError("the caller's own")
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_was_announced_but_not_written_is_told(tmp_path):
    with pytest.raises(CompressError, match="none written for b"), ShardWriter(
        tmp_path, {"a": SPECS["a"], "b": SPECS["b"]}
    ) as writer:  # fmt: skip
        writer.write("a", TENSORS["a"])
    assert list(tmp_path.iterdir()) == []


def test_another_shape_than_announced_is_told(tmp_path):
    with pytest.raises(CompressError, match=r"\[3, 5\]"), ShardWriter(tmp_path, SPECS) as writer:
        writer.write("b", torch.zeros(3, 4))


def test_a_folder_that_is_not_empty_is_refused(tiny, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(CompressError, match="new or empty"):
        save_model(tiny.build("llama"), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_another_model_does_not_verify(tiny, tmp_path):
    save_model(tiny.build("llama"), tmp_path / "out")
    expected = tiny.logits(tiny.build("llama", seed=1))
    with pytest.raises(CompressError, match="logits that differ"):
        verify(tmp_path / "out", expected, tiny.inputs(), tiny.auto_class("llama"))


def test_a_missing_tensor_does_not_verify(tiny, tmp_path):
    model = tiny.build("llama")
    save_model(model, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CompressError, match="missing keys: model.layers.1.mlp.up_proj"):
        verify(tmp_path / "out", tiny.logits(model), tiny.inputs(), tiny.auto_class("llama"))
