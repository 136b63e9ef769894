"""What Python users have as calibration data, and what each becomes."""

from __future__ import annotations

import copy
import gzip
import json
import re
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers.tokenization_utils_base import BatchEncoding

import compress
from compress.data.calibration_inputs import calibration_inputs
from compress.data.text import TextSpec, load_text
from compress.errors import CompressError

TEXTS = ["the river under light", "slow and quick"]


def rows(batches):
    return [row.tolist() for batch in batches for row in batch["input_ids"]]


def test_one_matrix_in_many_forms(tiny, tokens):
    datasets = pytest.importorskip("datasets")
    model = tiny("llama")
    table = datasets.Dataset.from_dict({"input_ids": tokens.tolist(), "name": ["x"] * len(tokens)})
    forms = {
        "tensor": tokens,
        "int32": tokens.int(),
        "array": tokens.numpy(),
        "lists": tokens.tolist(),
        "arrays": list(tokens.numpy()),
        "rows": list(tokens),
        "batches": tokens.split(2),
        "generator": (t for t in tokens.split(1)),
        "mapping": BatchEncoding({"input_ids": tokens, "token_type_ids": tokens * 0}),
        "list of dicts": [{"input_ids": t.tolist()} for t in tokens],
        "loader": DataLoader(TensorDataset(tokens), batch_size=2),
        "data set": table,
        "loader of a data set": DataLoader(table.with_format("torch"), batch_size=2),
    }
    for name, form in forms.items():
        found = calibration_inputs(form, model)
        assert rows(found) == tokens.tolist(), name
        assert all(set(b) == {"input_ids"} and b["input_ids"].dtype == torch.int64 for b in found)


def test_texts_get_what_the_tokenizer_adds(tiny, tokenizer):
    datasets = pytest.importorskip("datasets")
    model = tiny("llama")
    expected = [tokenizer(text)["input_ids"] for text in TEXTS]
    table = datasets.Dataset.from_dict({"text": TEXTS})
    forms = [TEXTS, table, ({"text": t} for t in TEXTS), tokenizer(TEXTS)]
    for form in (*forms, DataLoader(TEXTS, batch_size=2), DataLoader(table, batch_size=2)):
        assert rows(calibration_inputs(form, model, tokenizer)) == expected
    cut = rows(calibration_inputs(TEXTS, model, tokenizer, length=2))
    assert [len(row) for row in cut] == [2, 2]


def test_conversations_go_through_the_chat_template(tiny, framing_tokenizer):
    datasets = pytest.importorskip("datasets")
    tokenizer = framing_tokenizer("[BOS] $A")
    tokenizer.chat_template = "[BOS]{% for m in messages %}{{ m['content'] }}|{% endfor %}"
    chats = [[{"role": "user", "content": text}] for text in TEXTS]
    expected = [tokenizer(f"{text}|")["input_ids"] for text in TEXTS]
    for form in (chats, datasets.Dataset.from_dict({"messages": chats})):
        assert rows(calibration_inputs(form, tiny("llama"), tokenizer)) == expected


def test_the_name_of_a_file_is_no_text(tiny, tokenizer, tmp_path):
    (tmp_path / "words.txt").write_text("the river")
    with pytest.raises(CompressError, match=r"name of a file.*words\.txt"):
        calibration_inputs(str(tmp_path / "words.txt"), tiny("llama"), tokenizer)
    assert rows(calibration_inputs("the river", tiny("llama"), tokenizer))


def test_padding_of_a_tokenizers_output_is_taken_away(tiny):
    ids = torch.tensor([[1, 2, 3, 0], [4, 5, 0, 0], [0, 0, 0, 0]])
    given = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    assert rows(calibration_inputs(given, tiny("llama"))) == [[1, 2, 3], [4, 5]]


REFUSED = {
    "a text alone": ("text", "tokenizer"),
    "texts alone": (TEXTS, "tokenizer"),
    "one sequence": ([1, 2, 3], "a sample that is int"),
    "a number": (5, "calibration"),
    "nothing in a list": ([None], "NoneType"),
    "floats": (torch.rand(2, 4), "whole numbers"),
    "truth values": (torch.ones(2, 4, dtype=torch.bool), "whole numbers"),
    "one dimension": (torch.arange(4), "samples, length"),
    "no tokens": (torch.zeros(2, 0, dtype=torch.int64), "something in it"),
    "above the vocabulary": (torch.full((2, 4), 999), "token ids from 0 to 263"),
    "below it": (torch.full((2, 4), -1), "token ids from 0 to 263"),
    "too long": (torch.ones(1, 129, dtype=torch.int64), "128 tokens"),
    "unknown input": ([{"input_ids": [1], "foo": [1]}], "foo"),
    "no input": ([{"attention_mask": [1]}], "input_ids"),
    "not finite": ([{"inputs_embeds": torch.full((1, 2, 32), float("nan"))}], "finite"),
    "no values": (torch.zeros(2, 2, dtype=torch.int64, device="meta"), "meta"),
    "ragged": ([{"input_ids": [[1, 2], [3]]}], "rows of one length"),
    "on its side": ([{"input_ids": [torch.ones(2), torch.ones(2)]}], "Stack them"),
    "labels in some": ([{"input_ids": [1], "labels": [1]}, [2]], "labels in all"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(tiny, what):
    given, message = REFUSED[what]
    with pytest.raises(CompressError, match=message):
        calibration_inputs(given, tiny("llama"))


def test_the_lines_of_the_documents_run(tiny, tokenizer):
    datasets = pytest.importorskip("datasets")
    document = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    names = {"torch": torch, "compress": compress, "datasets": datasets, "DataLoader": DataLoader,
             "TensorDataset": TensorDataset}  # fmt: skip
    for part in ("Calibration", "Evaluation"):
        lines = re.search(rf"## {part} in Python.*?```python\n(.*?)```", document, re.DOTALL)[1]
        exec(lines, {"model": tiny("llama"), "tokenizer": tokenizer, **names})


def test_the_files_of_the_documents_are_read(tmp_path, tokenizer, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    for name in ("notes.txt", "notes-1.txt", "notes-2.txt"):
        (tmp_path / name).write_text("One.\nTwo.\n")
    rows = "".join(json.dumps({"body": f"Row {n}."}) + "\n" for n in range(3))
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    chat = [{"role": "user", "content": "Hello?"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    (tmp_path / "proteins.txt").write_text("MKTAYI\nGAVL\n\nMSE\n")
    saved = datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": ["a", "b"]})})
    saved.save_to_disk("saved")
    document = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    lines = re.findall(r"^TextSpec\(.*", document, re.MULTILINE)
    reader = copy.deepcopy(tokenizer)
    reader.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
    found = [load_text(eval(line, {"TextSpec": TextSpec}), tokenizer=reader) for line in lines]
    three = ("Row 0.", "Row 1.", "Row 2.")
    assert [text.documents for text in found[:-1]] == [
        ("One.\nTwo.\n",), ("One.\nTwo.\n",), three, ("user: Hello?",), three, ("a", "b"),
        ("MKTAYI", "GAVL", "MSE"),
    ]  # fmt: skip
    with pytest.raises(CompressError, match="Did you mean 'test'"):
        load_text(TextSpec(source="saved", split="tets"))
    (tmp_path / "broken.txt.gz").write_text("not packed")
    with pytest.raises(CompressError, match="not packed with gzip"):
        load_text("broken.txt.gz")
