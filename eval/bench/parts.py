"""Benchmarks of several parts: each is a module of their package, measured and published alone."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping
from pathlib import Path

from compress.eval.bench.options import parser, publish, say, work_folder


def parts_parser(description: str | None, parts: Mapping[str, str]) -> argparse.ArgumentParser:
    """A parser that also takes which parts, by their names, and where data lie."""
    made = parser(description)
    made.add_argument("--only", choices=list(parts), action="append", help="default: all")
    made.add_argument("--data-root", type=Path, help="local copies of data sets (docs/data.md)")
    return made


def measure_parts(
    topic: str, parts: Mapping[str, str], arguments: argparse.Namespace, *, apart: bool = False
) -> None:
    """Measure parts and merge their rows into a topic's results.

    Args:
        topic: also the package beside this file whose modules are the parts, each with a function
            ``measure(work, arguments)`` that returns rows.
        parts: what each measures, by the module's name.
        apart: each has a work folder of its own.
    """
    for part in arguments.only or parts:
        say(f"part {part}: {parts[part]}")
        module = importlib.import_module(f"compress.eval.bench.{topic}.{part}")
        work = work_folder(arguments, topic)
        if apart:
            work = work / part
            work.mkdir(exist_ok=True)
        publish(arguments, work, module.measure(work, arguments), topic)
