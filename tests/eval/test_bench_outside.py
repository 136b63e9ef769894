"""What is measured by running something else: the test suite, and cases from outside."""

from __future__ import annotations

from argparse import Namespace

import pytest

from compress.errors import CompressError
from compress.eval.bench.robust import attack, suite

CASES = """
import argparse, json, os, pathlib, sys
p = argparse.ArgumentParser()
p.add_argument("groups", nargs="*"); p.add_argument("--only", action="append")
p.add_argument("--list", action="store_true")
a = p.parse_args()
cases = [("data", "one", "clean"), ("data", "two", "hang"), ("hub", "three", "traceback")]
if a.list:
    for group, name, _ in cases:
        print(f"{group:11} {name:40} what it tries")
    print(len(cases)); sys.exit()
folder = pathlib.Path(os.environ["ATTACK_DIR"])
for group, name, verdict in cases:
    if group in a.groups and name in a.only:
        line = {"group": group, "case": name, "verdict": verdict, "detail": "because"}
        with (folder / "results" / f"{group}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\\n")
sys.exit(1)
"""


def values(rows) -> dict[str, float]:
    return {row.figure.rpartition(": ")[2]: row.value for row in rows}


def test_cases_are_tried_once_a_code_and_counted_by_verdict(tmp_path):
    cases = tmp_path / "cases"
    cases.mkdir()
    (cases / "attack.py").write_text(CASES)
    arguments = Namespace(attack=cases, smoke=False)
    first = attack.measure(tmp_path / "work", arguments)
    found = values(first)
    assert (found["tried"], found["hang"], found["traceback"], found["memory"]) == (3, 1, 1, 0)
    assert {row.figure.rpartition(": ")[2]: row.met for row in first}["hang"] is False
    lines = [p for p in (tmp_path / "work").rglob("*.jsonl") for _ in p.open()]
    assert attack.measure(tmp_path / "work", arguments) == first
    assert len(lines) == len([p for p in (tmp_path / "work").rglob("*.jsonl") for _ in p.open()])


def test_without_cases_the_part_is_left_out_and_says_so(tmp_path, capsys):
    assert attack.measure(tmp_path, Namespace(attack=None, smoke=False)) == []
    assert "left out" in capsys.readouterr().err
    with pytest.raises(CompressError, match="a folder with attack.py"):
        attack.measure(tmp_path, Namespace(attack=tmp_path, smoke=False))


def test_failures_of_the_suite_are_counted_and_precisions_by_name(tmp_path):
    (tmp_path / "junit.xml").write_text(
        '<testsuites><testsuite><testcase name="a[llama-bfloat16]"/>'
        '<testcase name="b[float32]"><failure/></testcase><testcase name="c"/>'
        '<testcase name="d[xfloat32]"><error/></testcase></testsuite></testsuites>'
    )
    found = values(suite.rows_of(tmp_path / "junit.xml", 361.0))
    assert (found["time"], found["failures"], found["tests"]) == (361, 2, 4)
    assert found["tests that name bfloat16"] == found["tests that name float32"] == 1
