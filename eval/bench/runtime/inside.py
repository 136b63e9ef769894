"""Quantised models inside transformers against float32: what the parts about that share.

Times are processor seconds of one thread, of models that take turns, as medians over the pairs: on
a machine that does other work the clock on the wall would measure that work. Perplexity is of
the first 4,096 tokens of WikiText-2 raw test in windows of 1,024.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import compress
from compress.eval.bench.masked_models import row
from compress.eval.bench.options import publish, say
from compress.eval.bench.peer_material import Material, Scale, prepare
from compress.eval.bench.provenance import DEFAULT, NO_DICTIONARY, NO_TRAINING
from compress.eval.bench.rows import Row
from compress.eval.quality.perplexity import perplexity
from compress.models.loading import load_model

# Other runtimes have no part in it.
CODE = (
    *DEFAULT,
    *NO_TRAINING,
    *NO_DICTIONARY,
    ":!compress/runtimes",
    "eval/bench/runtime/inside.py",
)
COMMAND = "python -m compress.eval.bench.runtime --only {}"
SCALE = Scale(samples=16, length=512, test=4096)
SMOKE = Scale(samples=2, length=64, test=512, window=256, blocks=2)

GRID = {"method": "rtn", "bits": 4, "group_size": 32, "symmetric": False}
FOUR = {"4 bits g32, embeddings 8": {**GRID, "embeddings": 8}, "4 bits g32": GRID}

_RESIDENT = """
import sys, torch, compress
import compressed_tensors.compressors, compressed_tensors.quantization
import compress.checkpoint.serving, transformers.models.llama.modeling_llama
from transformers import AutoModelForCausalLM
from compress.system import memory
torch.set_num_threads(1)
before = memory.resident()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
with torch.no_grad():
    model(torch.arange(3, 11)[None])
memory.trim()
print(memory.resident() - before)
"""


def made(work: Path, name: str, step: dict[str, Any], material: Material) -> Path:
    """The checkpoint of a step on SmolLM2, made once."""
    folder = work / f"{material.key}-{name.replace(' ', '-').replace(',', '')}"
    if not (folder / "config.json").exists():
        say(f"{name}: compressing")
        from safetensors.torch import load_file

        model, tokenizer = compress.load(material.model)
        calibration = load_file(material.tokens)["calibration"] if "smoothing" in step else None
        compress.apply(model, [step], calibration=calibration)
        compress.save(model, folder, tokenizer)
    return folder


def paired(one: Callable[[], Any], other: Callable[[], Any], pairs: int) -> float:
    """Median over pairs, which alternate, of the processor time of ``one`` over ``other``'s."""
    ratios = []
    for number in range(pairs):
        seconds = {}
        for side in (one, other) if number % 2 == 0 else (other, one):
            start = time.thread_time()
            side()
            seconds[side] = time.thread_time() - start
        ratios.append(seconds[one] / seconds[other])
    return statistics.median(ratios)


class Decoding:
    """Greedy decoding after a prompt, a few tokens at each call."""

    def __init__(self, model: PreTrainedModel, tokens: int) -> None:
        self.model, self.tokens = model, tokens
        with torch.no_grad():
            self.output = model(torch.arange(100, 164)[None], use_cache=True)

    @torch.no_grad()
    def __call__(self) -> None:
        for _ in range(self.tokens):
            token, cache = self.output.logits[:, -1:].argmax(-1), self.output.past_key_values
            self.output = self.model(token, past_key_values=cache, use_cache=True)


def prefill(model: PreTrainedModel, tokens: int) -> Callable[[], None]:
    """A forward as a server does it: with the logits of the last token only."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 20_000, (1, tokens), generator=generator)

    @torch.no_grad()
    def run() -> None:
        model(ids, logits_to_keep=1)

    return run


def resident(folder: Path) -> int:
    """Bytes that a model adds to a fresh process with all libraries: loaded, and run once."""
    done = subprocess.run(
        [sys.executable, "-c", _RESIDENT, str(folder)], capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1])


def speeds(
    label: str, part: str, dense: PreTrainedModel, model: PreTrainedModel, few: bool, **bars: float
) -> list[Row]:
    """Decode and prefill against float32, in alternating pairs."""
    command, rows = COMMAND.format(part), []
    say(f"{label}: decode and prefill")
    tokens = 2 if few else 16
    one, other = Decoding(dense, tokens), Decoding(model, tokens)
    one(), other()
    ratio = paired(one, other, 3 if few else 7)
    rows.append(
        row(command, f"{label}: decode speed-up, 128 tokens", ratio, unit="x", op=">=",
            bar=bars.get("decode"))
    )  # fmt: skip
    length = 64 if few else 1024
    one, other = prefill(dense, length), prefill(model, length)
    one(), other()
    ratio = paired(one, other, 3)
    rows.append(
        row(command, f"{label}: prefill speed-up, 1,024 tokens", ratio, unit="x", op=">=",
            bar=bars.get("prefill"))
    )  # fmt: skip
    return rows


def compared(
    part: str, steps: dict[str, dict[str, Any]], bars: dict[str, float], work: Path,
    arguments: Namespace,
) -> list[Row]:  # fmt: skip
    """Each step's speeds, memory and perplexity, beside those of float32; bars of the first."""
    torch.set_num_threads(1)
    material = prepare(work, SMOKE if arguments.smoke else SCALE, arguments.data_root)
    ids, scale = material.test_ids(), material.scale
    dense = load_model(material.model, dtype=torch.float32)
    before = perplexity(dense, ids, window=scale.window).perplexity
    full = resident(material.model)
    command, rows = COMMAND.format(part), []
    for number, (name, step) in enumerate(steps.items()):
        own = {} if number else bars
        label, folder = f"SmolLM2 {name}", made(work, name, step, material)
        model = load_model(folder, dtype=torch.float32)
        rows += speeds(label, part, dense, model, arguments.smoke, **own)
        after = perplexity(model, ids, window=scale.window).perplexity
        rows += [
            row(command, f"{label}: perplexity / float32", after / before,
                bar=own.get("perplexity")),
            row(command, f"{label}: resident memory / float32", resident(folder) / full,
                bar=own.get("memory")),
        ]  # fmt: skip
        publish(arguments, work, rows, "runtime", whole=False)
    return rows
