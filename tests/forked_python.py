"""Interpreters that have imported torch and transformers, and nothing of ours, in milliseconds.

Importing the two takes five seconds, so tests that need a process of their own ask one interpreter
that has done so: it forks. Run as a script, this file is that interpreter. What must be seen of the
imports themselves, or of variables that libraries read while they are imported, needs a process
that starts from nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PRELOADED = (
    "torch", "transformers", "transformers.modeling_utils", "safetensors.torch", "pydantic", "yaml",
    "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto",
)  # fmt: skip


@dataclass
class Started:
    """A process that has been started; its files are in ``folder``."""

    arguments: tuple[str, ...]
    folder: Path

    def wait(self, timeout: float = 600) -> subprocess.CompletedProcess:
        """Its exit status (of a signal: negative) and what it printed."""
        end = time.monotonic() + timeout
        while not (self.folder / "status").exists():
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.arguments, timeout)
            time.sleep(0.03)
        status = int((self.folder / "status").read_text())
        out, err = ((self.folder / name).read_text() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(self.arguments, status, out, err)


class ForkedPython:
    """Starts processes as ``python *arguments`` would; itself it starts with the first of them."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="compress-forked-")

    def start(
        self, *arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None
    ) -> Started:
        """Start ``-c CODE …``, ``-m MODULE …`` or ``SCRIPT …``.

        Args:
            env: variables beside those of this process.
        """
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            )  # fmt: skip
        words = tuple(map(str, arguments))
        started = Started(words, Path(tempfile.mkdtemp(dir=self._folder.name)))
        task = {
            "arguments": words, "folder": str(started.folder), "cwd": str(cwd or os.getcwd()),
            "environment": {**os.environ, **(env or {})},
        }  # fmt: skip
        self._server.stdin.write(json.dumps(task) + "\n")
        self._server.stdin.flush()
        return started

    def __call__(self, *arguments: object, **places: Any) -> subprocess.CompletedProcess:
        """Start a process and wait for its end."""
        return self.start(*arguments, **places).wait()

    def close(self) -> None:
        if self._server is not None:
            self._server.stdin.close()
            self._server.wait()
        self._folder.cleanup()


def serve() -> None:
    """Fork for every task, a line of JSON on standard input."""
    import importlib

    for name in PRELOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        if os.fork() == 0:
            _keep(json.loads(line))
            os._exit(0)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


def _keep(task: dict[str, Any]) -> None:
    """Fork once more and write down how that ended."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = _run(task)
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    folder = Path(task["folder"])
    (folder / "ended").write_text(str(status))
    (folder / "ended").rename(folder / "status")


def _run(task: dict[str, Any]) -> int:
    import atexit
    import runpy
    import traceback

    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(Path(task["folder"]) / name, os.O_CREAT | os.O_WRONLY)
        os.dup2(file, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(task["environment"])
    os.chdir(task["cwd"])
    kind, *rest = task["arguments"]
    places = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    first = "" if kind == "-c" else task["cwd"] if kind == "-m" else str(Path(kind).parent)
    sys.path[:1] = [first, *filter(None, places)]
    status: Any = 0
    try:
        if kind == "-c":
            sys.argv = ["-c", *rest[1:]]
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        elif kind == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [kind, *rest]
            runpy.run_path(kind, run_name="__main__")
    except SystemExit as leave:
        status = leave.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    if not isinstance(status, int):
        print(status, file=sys.stderr)
        status = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    return status


if __name__ == "__main__":
    serve()
