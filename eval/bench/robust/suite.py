"""The test suite as `make test` runs it: how long it takes, and what fails.

What learns is tested in float32 and in forced bfloat16 whatever the machine would choose, so one
run covers both; how many tests name each precision is told beside the bars.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from argparse import Namespace
from pathlib import Path

from compress.errors import CompressError
from compress.eval.bench.masked_models import row
from compress.eval.bench.options import say
from compress.eval.bench.provenance import ROOT
from compress.eval.bench.rows import Row

COMMAND = "python -m compress.eval.bench.robust --only suite"
CODE = ("compress", "eval", ":!eval/results", "recipes", "tests")
SECONDS = 360.0
PRECISIONS = ("float32", "bfloat16")
_SMOKE = ("tests/test_recipe.py",)


def measure(work: Path, arguments: Namespace) -> list[Row]:
    """Run the suite once, from the start: seconds, failures, tests of each precision.

    Raises:
        CompressError: the suite did not run at all.
    """
    results, log = work / "junit.xml", work / "suite.log"
    results.unlink(missing_ok=True)
    command = ["make", "test"]
    if arguments.smoke:
        command = [sys.executable, "-m", "pytest", *_SMOKE]
    environment = os.environ | {"PYTEST_ADDOPTS": f"--junitxml={results}"}
    say(f"running the test suite; its output is in {log}")
    started = time.perf_counter()
    with log.open("wb") as output:
        subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
    seconds = time.perf_counter() - started
    if not results.exists():
        tail = "\n".join(log.read_text(errors="replace").strip().splitlines()[-12:])
        raise CompressError(f"`{' '.join(command)}` to run", tail, f"The output is in {log}")
    return rows_of(results, seconds)


def rows_of(results: Path, seconds: float) -> list[Row]:
    """Rows of a JUnit XML file."""
    cases = list(ElementTree.parse(results).iter("testcase"))
    names = [case.get("name", "") for case in cases]
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    for name in failed:
        say(f"failed: {name}")
    rows = [
        row(COMMAND, "test suite: time", seconds, unit="s", bar=SECONDS),
        row(COMMAND, "test suite: failures", len(failed), bar=0),
        row(COMMAND, "test suite: tests", len(cases), op=">="),
    ]
    return rows + [
        row(COMMAND, f"test suite: tests that name {precision}",
            sum(_names(name, precision) for name in names), op=">=")
        for precision in PRECISIONS
    ]  # fmt: skip


def _names(test: str, precision: str) -> bool:
    """Whether a test's parameters (``name[a-b]``) hold the precision."""
    parameters = test.partition("[")[2].rstrip("]")
    return precision in parameters.replace("_", "-").split("-")
