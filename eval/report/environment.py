"""Describe this machine for a report."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from compress.eval.report.schema import Environment

_PACKAGES = ("torch", "transformers", "compressed-tensors", "lm_eval", "safetensors", "tokenizers")


def environment() -> Environment:
    """Return versions, processor, threads and memory of this process's machine."""
    import psutil
    import torch

    cuda = torch.cuda.is_available()
    return Environment(
        platform=f"{platform.system()} {platform.machine()}",
        cpu=processor_name(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        memory_bytes=psutil.virtual_memory().total,
        accelerator=torch.cuda.get_device_name() if cuda else None,
        versions=versions(),
    )


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result; package -> version."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def processor_name() -> str:
    """The processor's name; ``platform.processor`` is empty on most Linux systems."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
