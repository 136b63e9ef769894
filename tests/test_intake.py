"""Files, JSON, YAML and expressions from outside: what would never end is refused at once."""

from __future__ import annotations

import json
import os
import time

import pytest

from compress.errors import CompressError
from compress.planning import recipe_yaml
from compress.system import expressions
from compress.system.intake import printable, read_json, regular_file, special_files, user_path


def test_what_is_no_regular_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    for path, word in [
        (tmp_path / "fifo", "a FIFO"), (tmp_path, "a folder"), ("/dev/zero", "a device"),
        (tmp_path / "none", "No such file"), (tmp_path / "loop", "symbolic links"),
        (tmp_path / "zero\0byte", "null byte"),
    ]:  # fmt: skip
        with pytest.raises(CompressError, match=f"(?i){word}"):
            regular_file(path, "a file")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("file")
    assert regular_file(tmp_path / "link", "a file") == tmp_path / "link"
    assert special_files(tmp_path) == ["fifo"]


@pytest.mark.parametrize("text", ["x" * 5000, "~nobody_such/x", "a\0b", "\udcff"])
def test_texts_that_can_be_no_path(text):
    with pytest.raises(CompressError, match="a model, got"):
        user_path(text, "a model")


def test_json_deeper_than_the_interpreter(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(CompressError, match="nested too deeply"):
        read_json(tmp_path / "deep.json", "JSON", "Fetch it again")
    (tmp_path / "large.json").write_text(json.dumps(["x"] * 100))
    with pytest.raises(CompressError, match="at most 50 bytes"):
        read_json(tmp_path / "large.json", "JSON", "Fetch it again", largest=50)


def test_what_terminals_obey_is_shown_instead():
    assert printable("\x1b[2Jx\x07\u202e\udcff") == "\\x1b[2Jx\\x07\\u202e\\udcff"
    for text in ("modèle-🦙", "两\n\tlines", "👩\u200d🔬"):
        assert printable(text) == text


_LISTS = "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))


@pytest.mark.parametrize(
    "text, word",
    [
        ("a0: &a0 [x,x]\n" + _LISTS, "values"),
        ("a: &a {b: *a}", "inside"),
        ("a: &a [[*a]]", "inside"),
        ("[" * 100_000, "nesting"),
        ("a: 1\na: 2", "second time"),
        ("a: {b: {c: 1, c: 2}}", "second time"),
        ("5: x", "no text"),
        ("a: " + "9" * 5000, "5000 characters"),
        ("a: 2024-99-99", "quote it"),
        ("a: !!python/name:os.system", "tag"),
        ("a: !!set {x}", "tag"),
        (r'a: "\ud83e"', "half a character"),
        ("a: [unclosed", "line 1"),
    ],
)
def test_yaml_that_is_more_than_plain_data(text, word):
    start = time.monotonic()
    with pytest.raises(ValueError, match=word):
        recipe_yaml.parse(text)
    assert time.monotonic() - start < 5


def test_yaml_that_people_write():
    assert recipe_yaml.parse("a: &d {x: 2:4}\nb: {<<: *d, y: 1e-3}\nc: *d") == {
        "a": {"x": "2:4"}, "b": {"x": "2:4", "y": 0.001}, "c": {"x": "2:4"},
    }  # fmt: skip
    # JSON is YAML, and spells characters beyond the first 65,536 as two.
    assert recipe_yaml.parse('{"a": "\\ud83e\\udd99", "b": null}') == {"a": "🦙", "b": None}
    assert recipe_yaml.parse("") is None


NAMES = [f"model.layers.{i}.mlp.{name}" for i in range(3) for name in ("up_proj", "down_proj")]


def test_an_expression_that_explodes_ends(monkeypatch):
    monkeypatch.setattr(expressions, "_SECONDS", 1.0)
    start = time.monotonic()
    with pytest.raises(CompressError, match="explode"):
        expressions.search(r"^(([a-z0-9_.])+)+!$", NAMES)
    assert time.monotonic() - start < 20


def test_expressions_find_what_re_finds():
    for pattern in (r"up_proj$", r"layers\.[01]\..*down", r"^(?!.*up).*(1|2)\.mlp", r"\.2\."):
        expressions.check_expression(pattern)
        expected = expressions._direct(pattern, NAMES)
        assert any(expected) and not all(expected)
        assert expressions.search(pattern, NAMES) == expected
    for pattern in ("(", "[z-a]", "a" * 2000):
        with pytest.raises(ValueError, match="regular expression"):
            expressions.check_expression(pattern)
