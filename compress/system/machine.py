"""What the results of this process depend on: the processor's name, versions of packages."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("torch", "transformers", "compressed-tensors", "lm_eval", "safetensors", "tokenizers")


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
