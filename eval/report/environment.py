"""Describe this machine for a report."""

from __future__ import annotations

import os
import platform

from compress.eval.report.schema import Environment
from compress.system.machine import processor_name, versions


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
