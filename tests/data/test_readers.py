"""Data files that are not what they seem: each gets a sentence, none is waited for."""

from __future__ import annotations

import gzip
import json
import os

import pytest

from compress.data.images import read_idx
from compress.data.text import TextSpec, load_text
from compress.errors import CompressError


@pytest.mark.parametrize(
    "name, content, word",
    [
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.jsonl", '{"text": ' + "[" * 100_000, "line 1"),
        ("a.json", '[{"text": ' + "9" * 5000 + "}]", "digits"),
        ("a.parquet", "PAR1 and no more", "readable"),
    ],
)
def test_files_that_do_not_parse(name, content, word, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(CompressError, match=word):
        load_text(str(tmp_path / name))


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "fifo.txt")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    for name, word in (("fifo", "a FIFO"), ("folder", "a folder"), ("zero", "a device")):
        with pytest.raises(CompressError, match=word):
            load_text(str(tmp_path / f"{name}.txt"))


def test_halves_of_characters_are_replaced(tmp_path):
    row = json.dumps({"text": "a \ud83d b 🦙"})
    (tmp_path / "a.jsonl").write_text(row)
    assert load_text(str(tmp_path / "a.jsonl")).documents == ("a \ufffd b 🦙",)


def test_links_out_of_the_data_root_are_not_followed(tmp_path):
    (tmp_path / "secret.txt").write_text("private")
    folder = tmp_path / "root/tiny_shakespeare"
    folder.mkdir(parents=True)
    (folder / "input.txt").symlink_to(tmp_path / "secret.txt")
    spec = TextSpec(source="karpathy/tiny_shakespeare")
    with pytest.raises(CompressError, match="karpathy/tiny_shakespeare"):
        load_text(spec, tmp_path / "root", endpoint="http://127.0.0.1:9")


def test_a_small_file_that_unpacks_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr("compress.data.images._LARGEST", 10**6)
    (tmp_path / "a.gz").write_bytes(gzip.compress(bytes(2 * 10**6)))
    with pytest.raises(CompressError, match="unpacked"):
        read_idx(tmp_path / "a.gz")
