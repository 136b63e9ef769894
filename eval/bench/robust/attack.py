"""Faults and bad inputs from a folder of cases that lies outside this repository.

The folder holds ``attack.py``, which runs cases against a command and writes one JSON line a case
to ``results/GROUP.jsonl`` below ATTACK_DIR. What the present code has been tried on already is kept
in the work folder and not tried again, unless it is the folder of cases that has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from argparse import Namespace
from collections import Counter, defaultdict
from pathlib import Path

from compress.errors import CompressError
from compress.eval.bench.masked_models import row
from compress.eval.bench.options import say
from compress.eval.bench.provenance import ROOT, code_key
from compress.eval.bench.rows import Row

COMMAND = "python -m compress.eval.bench.robust --only attack --attack DIR"
CODE = ("compress", "eval", ":!eval/bench", ":!eval/results", "recipes")
BARS: dict[str, float | None] = {
    "silent-wrong": 0, "hang": 0, "memory": 0, "lost-data": 0, "traceback": 10,
    # A misleading or late message, and a fault of the cases' own.
    "unclear": None, "harness": None,
}  # fmt: skip
_SMOKE = 3


def measure(work: Path, arguments: Namespace) -> list[Row]:
    """Try every case that the present code has not been tried on; rows by verdict.

    Raises:
        CompressError: no such folder of cases, or it does not list or run them.
    """
    if arguments.attack is None:
        say("left out: give the folder of the cases with --attack DIR")
        return []
    script = arguments.attack.resolve() / "attack.py"
    if not script.is_file():
        raise CompressError("a folder with attack.py", str(arguments.attack), where="--attack")
    folder = work / f"{code_key()}-{_digest(script.parent)}"
    (folder / "results").mkdir(parents=True, exist_ok=True)
    wanted = _listed(script, folder)
    if arguments.smoke:
        wanted = wanted[:_SMOKE]
    done = verdicts(folder)
    left = defaultdict(list)
    for group, name in wanted:
        if (group, name) not in done:
            left[group].append(name)
    for group, names in left.items():
        say(f"{group}: {len(names)} cases")
        chosen = [part for name in names for part in ("--only", name)]
        with (folder / f"{group}.log").open("ab") as log:
            subprocess.run([sys.executable, script, group, *chosen], cwd=ROOT, stdout=log,
                           stderr=subprocess.STDOUT, env=_environment(folder),
                           preexec_fn=_heed_signals)  # fmt: skip
    done = verdicts(folder)
    missing = [case for case in wanted if case not in done]
    if missing:
        raise CompressError(
            "a verdict of every case", f"none of {len(missing)}, first {'/'.join(missing[0])}",
            f"See the logs in {folder}, then run the same command again",
        )  # fmt: skip
    return rows_of({case: done[case] for case in wanted})


def verdicts(folder: Path) -> dict[tuple[str, str], dict[str, str]]:
    """The last line of each case, by group and name; a line that a kill has cut is left out."""
    found = {}
    for path in sorted((folder / "results").glob("*.jsonl")):
        for line in path.read_text(errors="replace").splitlines(keepends=True):
            if line.endswith("\n"):
                entry = json.loads(line)
                found[entry["group"], entry["case"]] = entry
    return found


def rows_of(found: dict[tuple[str, str], dict[str, str]]) -> list[Row]:
    """A row a bad verdict and one of all cases; each bad case is told on the terminal."""
    for (group, name), entry in found.items():
        if entry["verdict"] in BARS:
            say(f"{entry['verdict']}: {group}/{name}: {entry['detail'][:200]}")
    counts = Counter(entry["verdict"] for entry in found.values())
    return [
        row(COMMAND, "cases from outside: tried", len(found), op=">="),
        *(row(COMMAND, f"cases from outside: {verdict}", counts[verdict], bar=bar)
          for verdict, bar in BARS.items()),
    ]  # fmt: skip


def _listed(script: Path, folder: Path) -> list[tuple[str, str]]:
    """Group and name of every case."""
    done = subprocess.run(
        [sys.executable, script, "--list"], cwd=ROOT, env=_environment(folder),
        capture_output=True, text=True,
    )  # fmt: skip
    cases = [tuple(line.split()[:2]) for line in done.stdout.splitlines()[:-1]]
    if done.returncode or not cases:
        raise CompressError(f"a list of cases from {script} --list", done.stderr[-500:] or "none")
    return cases


def _heed_signals() -> None:
    """In the background, or behind nohup, a process inherits that it ignores these; cases that send
    them would find that nothing stops."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _environment(folder: Path) -> dict[str, str]:
    python = Path(sys.executable)  # not resolved: a link in a virtual environment stays in it
    return os.environ | {
        "ATTACK_DIR": str(folder), "COMPRESS_BIN": str(python.with_name("compress")),
        "PYTHON_BIN": str(python), "FAST": "1", "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip


def _digest(folder: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:8]
