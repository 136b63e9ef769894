"""Results in the runtimes that they are exported to: what the parts about that share.

Each is timed in alternating pairs against transformers in float32 and against the same runtime's
float32: half of what a runtime gains on a CPU has nothing to do with compression. Prefill is of
1,024 tokens; decoding is of 128 behind a short prompt, one sequence, on the clock of the wall and
with all threads.
"""

from __future__ import annotations

import math
import shutil
from argparse import Namespace
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import compress
from compress.data.text import TextSpec, load_text
from compress.errors import CompressError
from compress.eval.bench.masked_models import row
from compress.eval.bench.options import say
from compress.eval.bench.peer_material import MODEL, TEXT, shortened
from compress.eval.bench.provenance import DEFAULT, NO_DICTIONARY, NO_TRAINING
from compress.eval.bench.rows import Row
from compress.eval.bench.runs import run_once
from compress.eval.cost.latency import PairedLatency, paired_latency
from compress.eval.quality.perplexity import perplexity
from compress.models.sources.source import load_config, load_model, load_tokenizer, resolve
from compress.planning.recipe import parse_recipe
from compress.runtimes.gguf.model import LlamaCppForCausalLM
from compress.runtimes.requirements import require

CODE = (*DEFAULT, *NO_TRAINING, *NO_DICTIONARY, "eval/bench/runtime/exported.py")
COMMAND = "python -m compress.eval.bench.runtime --only {}"
ONNX, LLAMA, TORCH = "onnxruntime", "llama.cpp", "transformers"


@dataclass(frozen=True)
class Scale:
    """Tokens of a prefill, of a continuation and of the prompt in front of it, pairs, tokens of the
    test text and its windows, sequences to calibrate with, blocks of the model (None: all)."""

    prefill: int = 1024
    decode: int = 128
    prompt: int = 64
    pairs: int = 5
    test: int = 32_768
    window: int = 512
    samples: int = 64
    blocks: int | None = None


FULL = Scale()
SMOKE = Scale(prefill=64, decode=8, pairs=3, test=1024, window=256, samples=2, blocks=2)

GROUPS = {"group_size": 32, "scales": "float16"}


@dataclass(frozen=True)
class Subject:
    """The model, and what a part makes of it.

    Attributes:
        dense: its checkpoint in float32.
        command: that the part's rows name.
    """

    dense: Path
    scale: Scale
    work: Path
    command: str
    data_root: Path | None

    def result(self, name: str, steps: list[dict[str, Any]]) -> Path:
        """The checkpoint that steps make of the model; kept, and gone on with where interrupted."""
        recipe = parse_recipe({
            "name": name.replace(" ", "-"), "model": str(self.dense), "device": "cpu",
            "steps": steps,
            "calibration": {
                "text": {**TEXT, "split": "train"}, "samples": self.scale.samples, "length": 512,
            },
        })  # fmt: skip
        return run_once(self.work, recipe.name, recipe.to_yaml(), self.data_root) / "model"

    def test(self) -> torch.Tensor:
        """Token ids of the head of WikiText-2 raw test."""
        text = load_text(TextSpec(**TEXT, split="test"), data_root=self.data_root).text
        tokenizer, _ = load_tokenizer(self.dense)
        count = self.scale.test
        ids = tokenizer(text[: 8 * count], add_special_tokens=False).input_ids[:count]
        return torch.tensor(ids)

    def pairs(self, before: nn.Module, after: nn.Module) -> PairedLatency:
        """Prefill, and decoding behind the short prompt."""
        scale = self.scale
        reading = paired_latency(before, after, scale.prefill, 0, repeats=scale.pairs)
        writing = paired_latency(before, after, scale.prompt, scale.decode, repeats=scale.pairs)
        return reading.model_copy(update={"decode": writing.decode, "decode_tokens": scale.decode})

    def nats(self, model: nn.Module) -> float:
        return perplexity(model, self.test(), window=self.scale.window).nll

    def in_torch(self, folder: Path | None = None) -> nn.Module:
        return load_model(folder or self.dense, dtype=torch.float32)

    def in_onnx(self, name: str, folder: Path, **options: Any) -> Any:
        """A checkpoint in onnxruntime."""
        out = self.work / f"onnx-{name.replace(' ', '-')}"
        shutil.rmtree(out, ignore_errors=True)
        compress.export(folder, "onnx", out, **options)
        return compress.load(out, runtime="onnx")[0]

    def in_llama(self, name: str, folder: Path, **options: Any) -> LlamaCppForCausalLM:
        """A checkpoint in llama.cpp."""
        out = self.work / f"{name.replace(' ', '-')}.gguf"
        out.unlink(missing_ok=True)
        compress.export(folder, "gguf", out, tokenizer=False, **options)
        context = self.scale.prefill + self.scale.decode
        return LlamaCppForCausalLM(out, load_config(folder), context)


def subject(work: Path, arguments: Namespace, part: str) -> Subject:
    """What a part measures, by the options of the command line."""
    scale = SMOKE if arguments.smoke else FULL
    root = arguments.data_root
    return Subject(
        shortened(resolve(MODEL).folder, work, scale.blocks), scale, work, COMMAND.format(part),
        root.expanduser().absolute() if root else None,
    )  # fmt: skip


def has_llama() -> bool:
    """Whether llama.cpp can be measured here; says so where not."""
    try:
        require("gguf", running=True)
    except CompressError as error:
        say(f"{LLAMA} is left out: {error}")
        return False
    return True


def speeds(
    command: str, label: str, than: str, paired: PairedLatency,
    decode: float | None = None, prefill: float | None = None,
) -> list[Row]:  # fmt: skip
    """Speeds over another model, with their bars."""
    assert paired.decode is not None
    told = partial(row, command, unit="x", op=">=")
    return [
        told(f"{label}: decode speed over {than}", paired.decode.speedup, bar=decode),
        told(f"{label}: prefill speed over {than}", paired.prefill.speedup, bar=prefill),
        row(command, f"{label}: decode, beside {than}", 1 / paired.decode.after, unit="tokens/s",
            op=">="),
    ]  # fmt: skip


def quality(
    command: str, label: str, there: float, here: float, bar: float | None = None
) -> list[Row]:
    """Perplexity of what runs, from nats a token there and of the same result in transformers.

    Args:
        bar: on how far the two are apart, whichever is the higher.
    """
    return [
        row(command, f"{label}: perplexity", math.exp(there)),
        row(command, f"{label}: perplexity, off that of the same result in transformers",
            100 * (math.exp(abs(there - here)) - 1), unit="%", bar=bar),
    ]  # fmt: skip


def speedups(paired: PairedLatency) -> dict[str, float]:
    assert paired.decode is not None
    return {"decode": paired.decode.speedup, "prefill": paired.prefill.speedup}
