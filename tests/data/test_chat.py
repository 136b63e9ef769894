"""Conversations go through the chat template; what is no text is refused."""

from __future__ import annotations

import json

import pytest

from compress.data.calibration import calibration_batches
from compress.data.calibration_spec import CalibrationSpec
from compress.data.text import TextSpec, load_text
from compress.errors import CompressError

TEMPLATE = (
    "[BOS]{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if messages[0]['role'] == 'tool' %}{{ raise_exception('no tool') }}{% endif %}"
)
CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "a light"}]


@pytest.fixture
def chatty(framing_tokenizer):
    tokenizer = framing_tokenizer("[BOS] $A")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def rows(tmp_path):
    def write(*values, suffix=".jsonl"):
        path = tmp_path / f"rows{suffix}"
        if suffix == ".parquet":
            import pyarrow.parquet

            table = pyarrow.Table.from_pylist(list(values))
            pyarrow.parquet.write_table(table, path)
        else:
            path.write_text("".join(json.dumps(value) + "\n" for value in values))
        return TextSpec(source=str(path))

    return write


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_messages_become_text_with_one_bos(rows, chatty, tiny, suffix):
    spec = rows({"messages": CHAT, "id": 1}, {"messages": CHAT[:1], "id": 2}, suffix=suffix)
    text = load_text(spec, tokenizer=chatty)
    # BOS comes back in front of each document, where the tokenizer would put it.
    assert text.documents == ("<user>hello\n<assistant>a light\n", "<user>hello\n")
    assert "chat template" in text.description
    given = CalibrationSpec(text=spec, samples=2, length=64, packing="documents")
    made = calibration_batches(given, chatty, tiny("llama").config)
    ids = made.batches[0]["input_ids"][0].tolist()
    assert ids.count(chatty.bos_token_id) == 1 and ids[0] == chatty.bos_token_id
    assert chatty.decode(ids[1:]) == text.documents[0]


def test_a_template_is_needed_and_may_refuse(rows, chatty, tokenizer):
    spec = rows({"messages": CHAT})
    for reader in (None, tokenizer):
        with pytest.raises(CompressError, match="chat template"):
            load_text(spec, tokenizer=reader)
    with pytest.raises(CompressError, match="no tool"):
        load_text(rows({"messages": [{"role": "tool", "content": "x"}]}), tokenizer=chatty)


@pytest.mark.parametrize(
    "value", [5, 1.5, True, ["a", "b"], {"a": 1}, [], [{"from": "user", "value": "x"}]]
)
def test_fields_that_hold_no_text_are_refused(rows, chatty, value):
    with pytest.raises(CompressError, match="text in the field 'text'.*in row 2"):
        load_text(rows({"text": "fine"}, {"text": value}), tokenizer=chatty)


def test_missing_texts_are_left_out(rows):
    text = load_text(rows({"text": None}, {"text": "a"}, {"text": ""}, {"text": "b"}))
    assert text.documents == ("a", "b")
