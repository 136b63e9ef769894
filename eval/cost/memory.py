"""Peak memory of loading a checkpoint and running one forward, in a process of its own.

Run as a module, it is that process: ``python -m compress.eval.cost.memory FOLDER --tokens 512``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from compress.errors import CompressError
from compress.models.positions import positions_of

TIMEOUT = 1800  # seconds


class PeakMemory(BaseModel):
    """Peak resident memory of a fresh process, bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    libraries: int = Field(description="after importing torch and transformers, before the model")
    load: int = Field(description="peak up to the end of from_pretrained")
    prefill: int = Field(description="peak up to the end of one forward")
    tokens: int = Field(description="length of that forward")


def peak_memory(
    folder: str | Path,
    *,
    prefill_tokens: int = 512,
    trust_remote_code: bool = False,
    loader: str | None = None,
    checkpoint: str | Path | None = None,
) -> PeakMemory:
    """Load ``folder`` in a fresh process, run one forward, and return the peaks.

    Args:
        folder: a checkpoint, or what was exported from one for another runtime.
        loader: ``module:function`` that loads such an export, called with its place, the
            checkpoint, the tokens of the forward and ``trust_remote_code``.
        checkpoint: that was exported.

    Raises:
        CompressError: the process failed; its last words are in the message.
    """
    command = [sys.executable, "-m", "compress.eval.cost.memory", str(folder), "--tokens"]
    command += [str(prefill_tokens), *(["--trust-remote-code"] if trust_remote_code else [])]
    if loader is not None:
        command += ["--loader", loader, "--checkpoint", str(checkpoint)]
    root = Path(__file__).resolve().parents[2]
    program = "import sys, runpy; sys.path.insert(0, sys.argv.pop(1)); "
    program += "runpy.run_module('compress.eval.cost.memory', run_name='__main__', alter_sys=True)"
    command[1:3] = ["-c", program, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CompressError(
            f"{folder} to load and run in a fresh process",
            f"exit status {done.returncode}: {last}",
            where="peak memory",
        )
    return PeakMemory.model_validate_json(done.stdout.strip().splitlines()[-1])


def peak_rss() -> int:
    """Return this process's peak resident memory in bytes.

    On Linux from VmHWM, because ``ru_maxrss`` survives exec: a child begins with the peak of the
    process that started it, which here holds two models.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--loader")
    parser.add_argument("--checkpoint")
    arguments = parser.parse_args()
    import torch
    import transformers

    import compress  # noqa: F401  registers the model types that only the toolkit can load
    from compress.models.images import image_tokens, random_image, reads_images
    from compress.models.loading import auto_class

    transformers.utils.logging.set_verbosity_error()
    remote = {"trust_remote_code": arguments.trust_remote_code}
    home = arguments.checkpoint or arguments.folder
    config = transformers.AutoConfig.from_pretrained(home, **remote)
    auto = auto_class(config)
    if reads_images(config):
        tokens, inputs = image_tokens(config), random_image(config)
    else:
        tokens = min(arguments.tokens, positions_of(config) or arguments.tokens)
        inputs = {"input_ids": torch.full((1, tokens), 3)}
    load = _loader(arguments, auto, tokens)
    libraries = peak_rss()
    model = load()
    loaded = peak_rss()
    keep = {"logits_to_keep": 1} if auto is transformers.AutoModelForCausalLM else {}
    with torch.no_grad():
        model(**inputs, **keep)
    result = PeakMemory(libraries=libraries, load=loaded, prefill=peak_rss(), tokens=tokens)
    print(json.dumps(result.model_dump()))


def _loader(arguments: Any, auto: Any, tokens: int) -> Callable[[], Any]:
    """What loads the model, its module imported already."""
    place, remote = Path(arguments.folder), {"trust_remote_code": arguments.trust_remote_code}
    if arguments.loader is None:
        return lambda: auto.from_pretrained(place, **remote).eval()
    module, _, name = arguments.loader.partition(":")
    function = getattr(importlib.import_module(module), name)
    return lambda: function(place, Path(arguments.checkpoint), tokens, **remote)


if __name__ == "__main__":
    _main()
