"""Texts: every kind of source, parts that keep apart, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pydantic import ValidationError

from compress.data.catalog import ALIASES, CATALOG, DEFAULT_SUBSETS, SUFFIXES, find
from compress.data.hub import read_hub_dataset
from compress.data.text import TextSpec, load_text, take_part
from compress.errors import CompressError

ROWS = ["alpha", "beta", "gamma \u00e9", "delta"]


def write(path: Path, kind: str) -> Path:
    path = path / f"rows.{kind}"
    rows = [{"text": text, "id": number} for number, text in enumerate(ROWS)]
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif kind == "json":
        path.write_text(json.dumps({"data": rows}), encoding="utf-8")
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        mark = {"csv": ",", "tsv": "\t"}[kind]
        lines = [mark.join(["text", "id"])] + [f"{row['text']}{mark}{row['id']}" for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv", "tsv"])
def test_rows_of_every_format(tmp_path, kind):
    text = load_text(str(write(tmp_path, kind)))
    assert list(text.documents) == ROWS
    assert text.text == "\n\n".join(ROWS)
    assert text.bytes == len(text.text.encode()) > len(text.text)
    assert len(text.digest) == 64


def test_plain_text_is_kept_to_the_byte(tmp_path):
    raw = b" \n = Title = \n\r\nBody\r\n"
    (tmp_path / "a.txt").write_bytes(raw)
    assert load_text(str(tmp_path / "a.txt")).text.encode() == raw


def test_pattern_of_files_is_sorted(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(name)
    text = load_text(TextSpec(source=str(tmp_path / "*.txt"), join="|"))
    assert text.text == "a|b|c"


def test_field_and_limit(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"body": "one"}\n\n{"body": "two"}\n{"body": "three"}\n')
    assert load_text(TextSpec(source=str(path), field="body", limit=2)).documents == ("one", "two")
    with pytest.raises(CompressError, match="body"):
        load_text(str(path))


def test_python_documentation_is_read_and_described():
    text = load_text("python:pydoc_data.topics")
    assert text.bytes > 200_000 and len(text.documents) > 50
    assert "Python 3" in text.description
    assert load_text("python:pydoc_data.topics").digest == text.digest


@pytest.mark.parametrize("module", ["requests", "os.path.x", "math", "json", "antigravity", "..x"])
def test_only_texts_of_the_standard_library(module):
    with pytest.raises(CompressError):
        load_text(f"python:{module}")


def test_python_source_is_never_run(tmp_path):
    # antigravity opens a browser when imported; reading a module must not import it.
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from compress.data.readers import read_python_module\n"
        "try: read_python_module('antigravity')\n"
        "except Exception: pass\n"
        "print('antigravity' in sys.modules)"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code, root], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("count", [2, 5, 10, 101])
@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5, 0.7, 0.8])
def test_head_and_tail_share_nothing(count, fraction):
    documents = [f"d{i}" for i in range(count)]
    head = take_part(documents, f"head:{fraction}")
    tail = take_part(documents, f"tail:{round(1 - fraction, 3)}")
    assert not set(head) & set(tail)
    assert head == documents[: len(head)] and (not tail or tail == documents[-len(tail) :])
    assert count - 1 <= len(head) + len(tail) <= count


def test_part_of_one_document_is_by_lines(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("".join(f"line {i}\n" for i in range(10)))
    head = load_text(TextSpec(source=str(path), part="head:0.8")).text
    tail = load_text(TextSpec(source=str(path), part="tail:0.2")).text
    assert head + tail == path.read_text()
    assert "head:0.8" in load_text(TextSpec(source=str(path), part="head:0.8")).description


def test_unknown_option_is_refused():
    with pytest.raises(ValidationError, match="feild"):
        TextSpec(source="x.txt", feild="text")


@pytest.mark.parametrize("content", ["", " \n\n\t "])
def test_empty_text(tmp_path, content):
    (tmp_path / "e.txt").write_text(content)
    with pytest.raises(CompressError, match="empty"):
        load_text(str(tmp_path / "e.txt"))


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(CompressError, match="a text file"):
        load_text(str(tmp_path / "nothing.txt"))
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(CompressError, match="UTF-8"):
        load_text(str(tmp_path / "bad.txt"))
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(CompressError, match="line 2"):
        load_text(str(tmp_path / "bad.jsonl"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(CompressError, match="parquet"):
        load_text(str(tmp_path / "bad.parquet"))


def test_data_root_by_convention(tmp_path):
    folder = tmp_path / "owner" / "name" / "sub"
    folder.mkdir(parents=True)
    write(folder, "jsonl").rename(folder / "test.jsonl")
    text = load_text(TextSpec(source="owner/name", subset="sub", split="test"), tmp_path)
    assert list(text.documents) == ROWS and "owner/name sub test" in text.description


def test_data_root_by_the_table(tmp_path):
    (tmp_path / "wikitext-2-raw").mkdir()
    (tmp_path / "wikitext-2-raw" / "wiki.test.raw").write_text(" \n = A = \n")
    for source in ("Salesforce/wikitext", "wikitext"):
        text = load_text(TextSpec(source=source, split="test"), tmp_path)
        assert text.text == " \n = A = \n"
    (tmp_path / "tinystories").mkdir()
    stories = "One.\nTwo.\n<|endoftext|>\nThree.\n"
    (tmp_path / "tinystories" / "tinystories_sample_2MiB.txt").write_text(stories)
    text = load_text("roneneldan/TinyStories", tmp_path)
    assert text.documents == ("One.\nTwo.", "Three.") and "2 MiB" in text.description


def test_data_root_must_exist(tmp_path):
    with pytest.raises(CompressError, match="data root"):
        load_text("wikitext", tmp_path / "nowhere")


def test_data_root_cannot_be_left(tmp_path):
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "train.txt").write_text("secret")
    assert find(root, "a/../../secret", None, "train") is None


def test_table_is_consistent():
    for (dataset, subset, _), local in CATALOG.items():
        assert not Path(local.path).is_absolute() and ".." not in local.path
        assert dataset not in ALIASES
        if local.field is not None:
            assert Path(local.path).suffix in SUFFIXES
        if not subset:
            assert dataset not in DEFAULT_SUBSETS
    assert set(ALIASES.values()) <= {dataset for dataset, _, _ in CATALOG}


def test_unreachable_hub_is_told_within_seconds(tmp_path):
    start = time.perf_counter()
    with pytest.raises(CompressError) as caught:
        read_hub_dataset("owner/name", None, "train", endpoint="http://127.0.0.1:9")
    assert "--data-root" in str(caught.value)
    (tmp_path / "c4").mkdir()
    (tmp_path / "c4" / "c4_validation_2k.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(CompressError, match="en/validation"):
        load_text("allenai/c4", tmp_path, endpoint="http://127.0.0.1:9")
    assert time.perf_counter() - start < 20


def test_every_file_of_the_table_reads(request):
    root = request.config.getoption("--data-root", default=None)
    if not root:
        pytest.skip("needs --data-root")
    for dataset, subset, split in CATALOG:
        spec = TextSpec(source=dataset, subset=subset or None, split=split)
        text = load_text(spec, Path(root))
        assert text.bytes > 10_000 and not text.text.startswith("{")


@pytest.mark.parametrize("part", ["head", "head:1.5", "middle:0.5", "tail:-1", "head:x", "head:0"])
def test_unknown_part(part):
    with pytest.raises(ValidationError, match="head:F"):
        TextSpec(source="x.txt", part=part)


def test_part_with_nothing_in_it(tmp_path):
    (tmp_path / "one.txt").write_text("a single line")
    with pytest.raises(CompressError, match="head:0.2"):
        load_text(TextSpec(source=str(tmp_path / "one.txt"), part="head:0.2"))
