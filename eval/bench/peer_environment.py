"""A virtual environment of its own for the tool that we compare with."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

from compress.errors import CompressError
from compress.eval.bench.options import say
from compress.eval.bench.process import failed
from compress.models.sources.cache import default_cache

PACKAGE, VERSION = "llmcompressor", "0.14.0.1"


def peer_python(given: Path | None) -> Path:
    """The interpreter of an environment with the peer in its pinned version.

    Args:
        given: an interpreter that has it; None makes the environment (once, some minutes).

    Raises:
        CompressError: the interpreter does not have that version, or pip cannot install it.
    """
    # Not resolved: the interpreter of a virtual environment is a link that must stay one.
    python = given.expanduser().absolute() if given is not None else _make()
    found = _version(python)
    if found != VERSION:
        raise CompressError(
            f"{PACKAGE} {VERSION} in the environment of {python}", found or "none",
            "Leave --peer-python out, and the benchmark makes an environment itself",
        )  # fmt: skip
    return python


def _make() -> Path:
    folder = default_cache() / "bench" / "peer-venv"
    python = folder / "bin" / "python"
    if _version(python) == VERSION:
        return python
    # The same torch as ours, or the comparison would be one of matrix kernels.
    torch = importlib.metadata.version("torch").partition("+")[0]
    say(f"installing {PACKAGE} {VERSION} and torch {torch} into {folder}")
    log = folder.with_name("peer-venv.log")
    folder.parent.mkdir(parents=True, exist_ok=True)
    packages = [f"{PACKAGE}=={VERSION}", f"torch=={torch}"]
    commands = (
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [str(python), "-m", "pip", "install", "--disable-pip-version-check", *packages],
    )
    with log.open("w") as file:
        for command in commands:
            if subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode:
                raise failed(command, log)
    return python


def _version(python: Path) -> str | None:
    """The version of the peer that an interpreter sees, without importing it."""
    code = f"import importlib.metadata as m; print(m.version({PACKAGE!r}))"
    try:
        done = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
