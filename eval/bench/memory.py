"""The memory contract: models larger than the memory that may be used.

Writes a 7B-shaped llama (random weights, bfloat16, 13.5 GB) once and takes it through
round-to-nearest W4 and through magnitude 2:4; writes a 1.1B-shaped one and takes it through GPTQ W4
with 16 x 512 tokens of Python's documentation. Each run is a process of its own with
--max-memory 2GB; its peak resident memory is what the kernel says at its end.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from compress.errors import CompressError
from compress.eval.bench.llama import write_llama
from compress.eval.bench.options import entry, parser, publish, say, work_folder
from compress.eval.bench.provenance import DEFAULT, NO_TRAINING
from compress.eval.bench.rows import Row
from compress.eval.bench.runs import Run, run_measured, write_recipe

LIMIT = 2.0  # GB of 1e9 bytes
CODE = (*DEFAULT, *NO_TRAINING)
COMMAND = "python -m compress.eval.bench.memory"

SHAPES = {
    "7B": {  # LLaMA-2-7B
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
    "1.1B": {  # TinyLlama-1.1B
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
        "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000,
        "max_position_embeddings": 2048,
    },
}  # fmt: skip
SMOKE = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 1000, "max_position_embeddings": 512,
}  # fmt: skip
CALIBRATION = {"text": {"source": "python:pydoc_data.topics"}, "samples": 16, "length": 512}


@dataclass(frozen=True)
class Case:
    """One model through one step.

    Attributes:
        room: bytes of free disk for a byte of the input: a run holds the finished blocks and then
            the checkpoint made from them.
    """

    label: str
    shape: str
    step: dict[str, Any]
    calibration: dict[str, Any] | None
    room: float


_W4 = {"bits": 4, "group_size": 128}
CASES = {
    "rtn": Case("7B-shaped llama, RTN W4", "7B", {"method": "rtn", **_W4}, None, 0.8),
    "magnitude": Case(
        "7B-shaped llama, magnitude 2:4", "7B", {"method": "magnitude", "pattern": "2:4"}, None, 2.1
    ),
    "gptq": Case(
        "1.1B-shaped llama, GPTQ W4, 16 x 512 tokens", "1.1B", {"method": "gptq", **_W4},
        CALIBRATION, 2.0,
    ),
}  # fmt: skip


def model_of(shape: str, work: Path, smoke: bool) -> Path:
    """The random llama of a shape, written at the first use."""
    folder = work / f"llama-{shape}"
    if not (folder / "config.json").exists():
        config = LlamaConfig(**(SMOKE if smoke else SHAPES[shape]), tie_word_embeddings=False)
        need_room(work, 2 * parameters(config))
        say(f"writing {2 * parameters(config) / 1e9:.1f} GB of random weights into {folder}")
        write_llama(folder, config, torch.bfloat16)
    return folder


def parameters(config: LlamaConfig) -> int:
    """Weights of a llama without tied embeddings, norms left out."""
    hidden = config.hidden_size
    keys = config.num_key_value_heads * hidden // config.num_attention_heads
    block = hidden * (2 * hidden + 2 * keys + 3 * config.intermediate_size)
    return config.num_hidden_layers * block + 2 * config.vocab_size * hidden


def need_room(folder: Path, count: float) -> None:
    """Refuse to start what the disk cannot hold."""
    free = shutil.disk_usage(folder).free
    if free < count + 1e9:
        raise CompressError(
            f"{(count + 1e9) / 1e9:.1f} GB of free disk in {folder}", f"{free / 1e9:.1f} GB",
            "Make room, or give a folder on another disk with --work",
        )  # fmt: skip


def run_case(name: str, work: Path, smoke: bool) -> Run:
    """Run one case and remove what it wrote."""
    case = CASES[name]
    model = model_of(case.shape, work, smoke)
    need_room(work, case.room * sum(f.stat().st_size for f in model.glob("*.safetensors")))
    fields: dict[str, Any] = {"model": {"source": str(model)}, "steps": [case.step]}
    if case.calibration is not None:
        fields["calibration"] = case.calibration
    say(case.label)
    out = work / name
    try:
        run = run_measured(write_recipe(work, name, **fields), out, max_memory=f"{LIMIT:g}GB")
    finally:
        shutil.rmtree(out, ignore_errors=True)
    say(
        f"  {run.usage.seconds:.0f} s ({run.step_seconds:.0f} s the step alone), peak "
        f"{run.usage.peak_bytes / 1e9:.3f} GB, verified by {run.verified}"
    )
    return run


def rows_of(name: str, run: Run) -> list[Row]:
    label, command = CASES[name].label, f"{COMMAND} --only {name}"
    return [
        Row(
            figure=f"{label}: peak memory", value=run.usage.peak_bytes / 1e9, unit="GB", op="<=",
            bar=LIMIT, peer=None, command=command,
        ),
        Row(
            figure=f"{label}: time", value=run.usage.seconds, unit="s", op="<=", bar=None,
            peer=None, command=command,
        ),
    ]  # fmt: skip


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", choices=sorted(CASES), help="one case")
    options.add_argument(
        "--clean", action="store_true", help="remove the random models too when they are done with"
    )
    arguments = options.parse_args()
    work = work_folder(arguments, "memory")
    for name in [arguments.only] if arguments.only else list(CASES):
        # Published one by one: each takes long enough to be worth keeping.
        publish(arguments, work, rows_of(name, run_case(name, work, arguments.smoke)))
    if arguments.clean:
        for shape in SHAPES:
            shutil.rmtree(work / f"llama-{shape}", ignore_errors=True)


if __name__ == "__main__":
    entry(main)
