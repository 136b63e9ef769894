"""The training of ``training_script.py``, in this process or in others."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).with_name("training_script.py")


@pytest.fixture(scope="session")
def training() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("training_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def launch(forked_python) -> Callable[..., subprocess.CompletedProcess]:
    """``launch(*arguments, processes=1)``: run the script, under ``accelerate launch`` if many."""

    def run(*arguments: object, processes: int = 1) -> subprocess.CompletedProcess:
        root = str(SCRIPT.parents[2])
        if processes == 1:
            return forked_python(SCRIPT, *arguments, cwd=root, env={"PYTHONPATH": root})
        command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu",
                   "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
                   "--main_process_port", "0", "--num_processes", str(processes)]  # fmt: skip
        return subprocess.run(
            [*command, str(SCRIPT), *map(str, arguments)], cwd=root, text=True, timeout=120,
            capture_output=True, env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    return run
