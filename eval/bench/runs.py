"""`compress run` on a recipe made by a benchmark, as a process of its own."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from compress.eval.bench.options import say
from compress.eval.bench.process import Usage, measure
from compress.eval.bench.provenance import code_key, machine_key, recipe_key


@dataclass(frozen=True)
class Run:
    """A run that is complete.

    Attributes:
        usage: of the whole process: import, steps, writing, verification.
        step_seconds: of the steps alone, from the run's journal.
        verified: how the checkpoint was compared with the model ("from_pretrained", "streaming").
    """

    folder: Path
    usage: Usage
    step_seconds: float
    verified: str

    @property
    def model(self) -> Path:
        return self.folder / "model"


def run_command(
    recipe: Path,
    out: Path,
    data_root: Path | None = None,
    max_memory: str | None = None,
    cache_dir: Path | None = None,
) -> list[str]:
    """The command line, with this interpreter."""
    command = [sys.executable, "-m", "compress", "run", str(recipe), "--out", str(out), "--quiet"]
    if data_root is not None:
        command += ["--data-root", str(data_root)]
    if max_memory is not None:
        command += ["--max-memory", max_memory]
    if cache_dir is not None:
        command += ["--cache-dir", str(cache_dir)]
    return command


def write_recipe(folder: Path, name: str, **fields: Any) -> Path:
    """Write ``<folder>/<name>.yaml``, a recipe for the CPU with these fields."""
    path = folder / f"{name}.yaml"
    data = {"version": 1, "name": name, "device": "cpu", **fields}
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return path


def run_measured(
    recipe: Path,
    out: Path,
    data_root: Path | None = None,
    max_memory: str | None = None,
    cache_dir: Path | None = None,
) -> Run:
    """Run a recipe from the start in ``out`` (emptied first) and measure the process.

    Raises:
        CompressError: the run failed; the end of its output is shown.
    """
    shutil.rmtree(out, ignore_errors=True)
    command = run_command(recipe, out, data_root, max_memory, cache_dir)
    usage = measure(command, out.with_name(out.name + ".log"))
    events = journal(out)
    return Run(
        out,
        usage,
        sum(event["seconds"] for event in events if event["event"] == "step"),
        next(event["through"] for event in events if event["event"] == "verified"),
    )


def remembered(path: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What an interrupted benchmark has measured by this code with these threads, or what
    ``compute`` measures now; it is kept beside ``path``, under its name and both keys."""
    kept = path.with_name(f"{path.name}-{code_key()}-{machine_key()}.json")
    if kept.exists():
        say(f"  from the interrupted benchmark: {kept.name}")
        return json.loads(kept.read_text())
    result = compute()
    temporary = kept.with_suffix(".tmp")
    temporary.write_text(json.dumps(result))
    temporary.replace(kept)
    return result


def run_once(work: Path, name: str, recipe_text: str, data_root: Path | None = None) -> Path:
    """The folder of a run of a recipe by the present code, ``work/NAME-CODE-RECIPE``.

    A finished one is taken as it is, an interrupted one goes on. Both keys are digests: what other
    code made, or of another recipe or text, is never taken for what this run would make.

    Raises:
        CompressError: the run failed; the end of its output is shown.
    """
    out = work / f"{name}-{code_key()}-{recipe_key(recipe_text, data_root)}"
    if not (out / "report.json").exists():
        recipe = out.with_name(out.name + ".yaml")
        recipe.write_text(recipe_text, encoding="utf-8")
        say(f"running {out.name}")
        whole = not out.exists()
        usage = measure(run_command(recipe, out, data_root), out.with_name(out.name + ".log"))
        if whole:
            _usage_file(out).write_text(json.dumps(asdict(usage)), encoding="utf-8")
    return out


def run_usage(folder: Path) -> Usage | None:
    """What the process of :func:`run_once` took; None where the run was interrupted."""
    path = _usage_file(folder)
    return Usage(**json.loads(path.read_text("utf-8"))) if path.exists() else None


def _usage_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.usage.json")


def step_seconds(folder: Path) -> float:
    """Time of all steps of a run, evaluations and checks left out."""
    return sum(event["seconds"] for event in journal(folder) if event["event"] == "step")


def step_cpu_seconds(folder: Path) -> float:
    """Processor time of all steps of a run, of all threads."""
    return sum(event["cpu_seconds"] for event in journal(folder) if event["event"] == "step")


def step_peak(folder: Path) -> float:
    """Highest resident memory of any step of a run, bytes."""
    return max(event["peak_bytes"] for event in journal(folder) if event["event"] == "step")


def journal(folder: Path) -> list[dict[str, Any]]:
    """Events of a run so far; a line that a crash has cut is left out."""
    path = folder / "journal.jsonl"
    whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
    return [json.loads(line) for line in whole.splitlines() if line.strip()]


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below ``folder``, by relative path."""
    result = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                name = path.relative_to(folder).as_posix()
                result[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return result
