"""A virtual environment of its own for each tool that we compare with."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from compress.errors import CompressError
from compress.eval.bench.options import say
from compress.eval.bench.process import failed
from compress.models.sources.cache import default_cache

PACKAGE, VERSION = "llmcompressor", "0.14.0.1"


@dataclass(frozen=True)
class Peer:
    """A tool in its pinned version.

    Attributes:
        package, version: on PyPI.
        shared: distributions beside it that are installed in the versions that we run with, or the
            comparison would be one of these.
        folder: name of its environment.
    """

    package: str
    version: str
    shared: tuple[str, ...] = ("torch",)
    folder: str = "peer-venv"


LLM_COMPRESSOR = Peer(PACKAGE, VERSION)
TORCH_PRUNING = Peer(
    "torch-pruning", "1.6.1", ("torch", "transformers", "safetensors"), "torch-pruning-venv"
)


def peer_python(given: Path | None, peer: Peer = LLM_COMPRESSOR) -> Path:
    """The interpreter of an environment with a peer in its pinned version.

    Args:
        given: an interpreter that has it; None makes the environment (once, some minutes).

    Raises:
        CompressError: the interpreter does not have that version, or pip cannot install it.
    """
    # Not resolved: the interpreter of a virtual environment is a link that must stay one.
    python = given.expanduser().absolute() if given is not None else _make(peer)
    found = _version(python, peer.package)
    if found != peer.version:
        raise CompressError(
            f"{peer.package} {peer.version} in the environment of {python}", found or "none",
            "Leave --peer-python out, and the benchmark makes an environment itself",
        )  # fmt: skip
    return python


def _make(peer: Peer) -> Path:
    folder = default_cache() / "bench" / peer.folder
    python = folder / "bin" / "python"
    if _version(python, peer.package) == peer.version:
        return python
    versions = {name: importlib.metadata.version(name).partition("+")[0] for name in peer.shared}
    packages = [f"{name}=={version}" for name, version in versions.items()]
    say(f"installing {peer.package} {peer.version} and {', '.join(packages)} into {folder}")
    log = folder.with_name(f"{peer.folder}.log")
    folder.parent.mkdir(parents=True, exist_ok=True)
    packages.insert(0, f"{peer.package}=={peer.version}")
    commands = (
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [str(python), "-m", "pip", "install", "--disable-pip-version-check", *packages],
    )
    with log.open("w") as file:
        for command in commands:
            if subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode:
                raise failed(command, log)
    return python


def _version(python: Path, package: str) -> str | None:
    """The version of a peer that an interpreter sees, without importing it."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    try:
        done = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
