"""The proof that a process which has only imported the package opens a checkpoint.

The process that wrote a checkpoint cannot prove that: it has registered the classes that the
checkpoint needs, by making them. So a clean interpreter is asked, one that has imported the package
and nothing else of ours, but for what the recipe imports: a model may be of a class that is
registered there. Starting it takes as long as importing torch and transformers (3 to 6 seconds) and
some 0.4 GB, so it is asked only where a registration of ours takes part in loading
(:func:`needs_fresh_process`): model types of our own, blocks of unequal width, code of the
checkpoint's own. All others are opened by the stock classes alone, which no step touches; loading
those in the process at hand proves the same.

A caller with many checkpoints to prove keeps one interpreter (:func:`kept_process`): it forks for
each proof, and so stays clean itself.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig

from compress.errors import CompressError
from compress.system.imports import run_imports

# Resident memory of an interpreter that has imported the package, torch and transformers: 400 MB
# with the CPU build of torch, which the proof needs beside the model.
BASE_BYTES = 450 * 2**20

_START = (
    "import sys; sys.path[:] = {path!r}; import compress; "
    "from compress.checkpoint.fresh import serve; serve({threads}, {fork})"
)
_kept: list[_Clean] = []


def needs_fresh_process(config: PreTrainedConfig) -> bool:
    """Whether a class that had to be registered takes part in loading a model of this config."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return config.is_heterogeneous or config.model_type not in CONFIG_MAPPING_NAMES


def prove_fresh(
    folder: str | os.PathLike[str],
    expected: torch.Tensor | None = None,
    inputs: Mapping[str, torch.Tensor] | None = None,
    *,
    trust_remote_code: bool = False,
    imports: tuple[str, ...] = (),
) -> float:
    """Do what :func:`compress.checkpoint.save.verify` does, in a clean process.

    Args:
        expected, inputs: as there; without them only names and shapes are compared, and no weight
            is loaded (:func:`compress.checkpoint.save.verify_shapes`).
        imports: code that the process runs first (:func:`compress.system.imports.run_imports`).

    Returns:
        The largest difference of logits relative to the largest logit; 0 for shapes.

    Raises:
        CompressError: as the functions that the process calls, or it ended without an answer.
    """
    with tempfile.TemporaryDirectory(prefix="compress-proof-") as scratch:
        tensors = {f"inputs.{k}": v.cpu().contiguous() for k, v in (inputs or {}).items()}
        if expected is not None:
            tensors["expected"] = expected.cpu().contiguous()
        save_file(tensors, Path(scratch) / "probe.safetensors")
        task = {
            "folder": os.path.abspath(folder),
            "scratch": scratch,
            "trust_remote_code": trust_remote_code,
            "imports": list(imports),
        }
        with _process() as process:
            answer = process.ask(task)
    if "refused" in answer:
        expected_text, got, fix = answer["refused"]
        raise CompressError(expected_text, f"{got} (in a process of its own)", fix)
    return answer["error"]


@contextlib.contextmanager
def kept_process() -> Iterator[None]:
    """Inside the block one clean interpreter serves all proofs, where processes can fork."""
    if not hasattr(os, "fork") or _kept:
        yield
        return
    process = _Clean(fork=True)
    _kept.append(process)
    try:
        yield
    finally:
        _kept.remove(process)
        process.close()


@contextlib.contextmanager
def _process() -> Iterator[_Clean]:
    if _kept:
        yield _kept[0]
        return
    process = _Clean(fork=False)
    try:
        yield process
    finally:
        process.close()


class _Clean:
    """A clean interpreter that reads tasks, a line of JSON each, and answers each with a line.

    It is started with the first task.

    Args:
        fork: let a child do each task, so that the interpreter stays clean.
    """

    def __init__(self, fork: bool) -> None:
        self._fork = fork
        self._process: subprocess.Popen[str] | None = None

    def _start(self) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        code = _START.format(path=sys.path, threads=torch.get_num_threads(), fork=self._fork)
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
        )  # fmt: skip

    def ask(self, task: dict[str, Any]) -> dict[str, Any]:
        """Have a task done; a CompressError where no answer comes."""
        answer = ""
        if self._process is None:
            self._start()
        with contextlib.suppress(OSError):
            self._process.stdin.write(json.dumps(task) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        if answer:
            return json.loads(answer)
        self._process.wait()
        self._log.seek(0)
        said = self._log.read().strip().splitlines()
        raise CompressError(
            f"a process that opens the checkpoint in {task['folder']}",
            f"one that ended with status {self._process.returncode}: {' '.join(said[-3:])}",
            "If the machine ran out of memory, run the same command again with more of it free: "
            "finished steps are kept",
        )

    def close(self) -> None:
        """End the interpreter, if it was started."""
        if self._process is None:
            return
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
        self._log.close()


def serve(threads: int, fork: bool) -> None:
    """Do tasks from standard input until it ends; what a clean interpreter runs."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    torch.set_num_threads(threads)
    for line in sys.stdin:
        if fork:
            _import_stock(json.loads(line)["folder"])
        else:
            answers.write(json.dumps(_do(json.loads(line))) + "\n")
            answers.flush()
            continue
        child = os.fork()
        if child:
            if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
                return  # without an answer
            continue
        status = 1
        try:
            answers.write(json.dumps(_do(json.loads(line))) + "\n")
            answers.flush()
            status = 0
        finally:
            os._exit(status)


def _import_stock(folder: str) -> None:
    """Import transformers' own module for a checkpoint, so that not every child has to."""
    with contextlib.suppress(OSError, ValueError, KeyError, ImportError, AttributeError):
        fields = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        kind = fields["model_type"].removeprefix("compress_").replace("-", "_")
        importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
        if "quantization_config" in fields:
            importlib.import_module("compressed_tensors")


def _do(task: dict[str, Any]) -> dict[str, Any]:
    from compress.checkpoint.save import verify, verify_shapes

    tensors = load_file(Path(task["scratch"]) / "probe.safetensors")
    folder, trust = task["folder"], task["trust_remote_code"]
    try:
        run_imports(tuple(task["imports"]), Path(), "the recipe")
        if "expected" not in tensors:
            verify_shapes(folder, trust_remote_code=trust)
            return {"error": 0.0}
        inputs = {
            name.removeprefix("inputs."): tensor
            for name, tensor in tensors.items()
            if name != "expected"
        }
        return {"error": verify(folder, tensors["expected"], inputs, trust_remote_code=trust)}
    except CompressError as error:
        return {"refused": [error.expected, error.got, error.fix]}
