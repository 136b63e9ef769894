"""How fast and how good results are in the runtimes that they are exported to.

SmolLM2-135M-Instruct, rounded to 4 bits by GPTQ and to 8 bits to nearest, in onnxruntime and (where
llama-cpp-python is installed) in llama.cpp, each in alternating pairs against transformers in
float32 and against the same runtime's float32: half of what a runtime gains on a CPU has nothing to
do with compression. Decoding is of one sequence behind a prompt.

A caution: the model's weights come from a Q4_1 file (asymmetric 4 bits in groups of 32). Another
grid has to be found for them, as for any weights; that one would lose nothing and prove nothing.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import compress
from compress.data.text import TextSpec, load_text
from compress.eval.bench import llama_cpp
from compress.eval.bench.options import entry, parser, publish, say, work_folder
from compress.eval.bench.peer_material import MODEL, TEXT, shortened
from compress.eval.bench.provenance import DEFAULT, NO_TRAINING
from compress.eval.bench.rows import Row
from compress.eval.bench.runs import run_measured, write_recipe
from compress.eval.cost.latency import PairedLatency, paired_latency
from compress.eval.quality.perplexity import perplexity
from compress.models.sources.source import load_config, load_model, load_tokenizer, resolve

CODE = (*DEFAULT, *NO_TRAINING)
COMMAND = "python -m compress.eval.bench.export_speed"
ONNX, LLAMA = "onnxruntime", "llama.cpp"
PARTS = ("onnx", "llama")


@dataclass(frozen=True)
class Scale:
    """Tokens of prompt and continuation, pairs, tokens of the test text and its windows, sequences
    to calibrate with, blocks of the model (None: all)."""

    prefill: int = 1024
    decode: int = 128
    pairs: int = 5
    test: int = 32_768
    window: int = 512
    samples: int = 64
    blocks: int | None = None


FULL = Scale()
SMOKE = Scale(prefill=64, decode=8, pairs=3, test=1024, window=256, samples=2, blocks=2)

STEPS: dict[str, dict[str, Any]] = {
    "4 bit": {"method": "gptq", "bits": 4, "group_size": 32, "scales": "float16"},
    "int8": {"method": "rtn", "bits": 8, "group_size": 32, "scales": "float16"},
    "W8A8": {"method": "w8a8"},
}
# Result -> bars of decoding and prefill against transformers, and of decoding against the same
# runtime's float32.
BARS: dict[str, tuple[float | None, float | None, float | None]] = {
    "4 bit": (9.0, None, 3.5),
    "int8": (6.0, None, 2.0),
    "W8A8": (None, 1.2, None),
}


@dataclass(frozen=True)
class Subject:
    """What is measured: the model and, beside it, its compressed forms as checkpoints."""

    dense: Path
    results: dict[str, Path]
    test: torch.Tensor
    scale: Scale
    work: Path

    def pairs(self, before: nn.Module, after: nn.Module) -> PairedLatency:
        return paired_latency(
            before, after, prefill_tokens=self.scale.prefill, decode_tokens=self.scale.decode,
            repeats=self.scale.pairs,
        )  # fmt: skip

    def nats(self, model: nn.Module) -> float:
        return perplexity(model, self.test, window=self.scale.window).nll


def prepare(work: Path, scale: Scale, data_root: Path | None, names: tuple[str, ...]) -> Subject:
    """The model and its compressed forms."""
    dense = shortened(resolve(MODEL).folder, work, scale.blocks)
    results = {}
    for name in names:
        folder = work / name.replace(" ", "-")
        say(f"{name}: compressing")
        text = {**TEXT, "split": "train"}
        recipe = write_recipe(
            work, folder.name, model={"source": str(dense)}, steps=[STEPS[name]],
            calibration={"text": text, "samples": scale.samples, "length": 512},
        )  # fmt: skip
        results[name] = run_measured(recipe, folder, data_root=data_root).model
    text = load_text(TextSpec(**TEXT, split="test"), data_root=data_root).text
    tokenizer, _ = load_tokenizer(dense)
    ids = tokenizer(text[: 8 * scale.test], add_special_tokens=False).input_ids[: scale.test]
    return Subject(dense, results, torch.tensor(ids), scale, work)


def onnx_rows(subject: Subject, original: nn.Module) -> list[Row]:
    """onnxruntime against transformers, and against its own float32."""
    row = partial(_row, command=f"{COMMAND} --only onnx")
    export = partial(_exported, subject.work)
    own = export("float32", subject.dense)
    paired = subject.pairs(original, own)
    rows = _speeds(row, ONNX, "float32", paired, (None, None), "transformers float32")
    for name, folder in subject.results.items():
        say(f"{ONNX}, {name}")
        model = export(name, folder, embeddings="8")
        decode, prefill, own_decode = BARS[name]
        paired = subject.pairs(original, model)
        rows += _speeds(row, ONNX, name, paired, (decode, prefill), "transformers float32")
        paired = subject.pairs(own, model)
        rows += _speeds(row, ONNX, name, paired, (own_decode, None), f"{ONNX} float32")
        rows += _quality(row, ONNX, name, subject.nats(model),
                         subject.nats(load_model(folder)), None)  # fmt: skip
        rows.append(row(f"{ONNX}, {name}: bytes of graph and weights", model.bytes / 1e6, "MB"))
    return rows


def llama_rows(subject: Subject, original: nn.Module) -> list[Row]:
    """llama.cpp with our GPTQ against transformers, and against its own rounding of the model."""
    row = partial(_row, command=f"{COMMAND} --only llama")
    name, folder = "4 bit", subject.results["4 bit"]
    ours = _gguf(subject.work, "gptq", folder, embeddings="Q8_0")
    theirs = _gguf(subject.work, "q4_0", subject.dense, type="Q4_0", embeddings="Q8_0")
    floats = _gguf(subject.work, "f32", subject.dense)
    context = subject.scale.prefill + subject.scale.decode
    open_ = partial(
        llama_cpp.LlamaCppForCausalLM, config=load_config(subject.dense), context=context
    )
    say(f"{LLAMA}, {name}")
    model = open_(ours)
    paired = subject.pairs(original, model)
    rows = _speeds(row, LLAMA, name, paired, (8.0, None), "transformers float32")
    rows += _speeds(row, LLAMA, name, subject.pairs(open_(floats), model), (None, None),
                    f"{LLAMA} float32")  # fmt: skip
    nats = partial(llama_cpp.mean_nll, ids=subject.test.tolist(), window=subject.scale.window)
    here, there = subject.nats(load_model(folder)), nats(ours)
    rows += _quality(row, LLAMA, name, there, here, 1.005)
    rows.append(row(
        f"{LLAMA}: perplexity of our GPTQ, over that of its own Q4_0 of the same model",
        math.exp(there - nats(theirs)), "", "<=", 1.0,
    ))  # fmt: skip
    rows.append(row(f"{LLAMA}: bytes of our GPTQ, over those of its own Q4_0",
                    ours.stat().st_size / theirs.stat().st_size, "", "<=", 1.0))  # fmt: skip
    return rows


def _exported(work: Path, name: str, folder: Path, **options: Any) -> nn.Module:
    out = work / f"onnx-{name.replace(' ', '-')}"
    shutil.rmtree(out, ignore_errors=True)
    compress.export(folder, "onnx", out, **options)
    return compress.load(out, runtime="onnx")[0]


def _gguf(work: Path, name: str, folder: Path, **options: Any) -> Path:
    out = work / f"{name}.gguf"
    out.unlink(missing_ok=True)
    compress.export(folder, "gguf", out, **options)
    return out


def _speeds(
    row: Callable[..., Row], runtime: str, name: str, paired: PairedLatency,
    bars: tuple[float | None, float | None], than: str,
) -> list[Row]:  # fmt: skip
    decode, prefill = bars
    assert paired.decode is not None
    label = f"{runtime}, {name}"
    return [
        row(f"{label}: decode speed over {than}", paired.decode.speedup, "x", ">=", decode),
        row(f"{label}: prefill speed over {than}", paired.prefill.speedup, "x", ">=", prefill),
        row(f"{label}: decode, beside {than}", 1 / paired.decode.after, "tokens/s"),
    ]


def _quality(
    row: Callable[..., Row], runtime: str, name: str, there: float, here: float, bar: float | None
) -> list[Row]:
    label = f"{runtime}, {name}: perplexity"
    return [
        row(label, math.exp(there), "", "<=", None),
        row(f"{label} over that of the same result in transformers", math.exp(there - here), "",
            "<=", bar),
    ]  # fmt: skip


def _row(
    figure: str, value: float, unit: str = "", op: str = ">=", bar: float | None = None, *,
    command: str,
) -> Row:  # fmt: skip
    return Row(figure=figure, value=value, unit=unit, op=op, bar=bar, peer=None, command=command)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", choices=PARTS, help="one runtime")
    options.add_argument("--data-root", type=Path, help="folder with local copies of data sets")
    arguments = options.parse_args()
    scale = SMOKE if arguments.smoke else FULL
    work = work_folder(arguments, "export")
    parts = [arguments.only] if arguments.only else list(PARTS)
    names = tuple(STEPS) if "onnx" in parts else ("4 bit",)
    subject = prepare(work, scale, arguments.data_root, names)
    original = load_model(subject.dense)
    rows: list[Row] = []
    if "onnx" in parts:
        rows += onnx_rows(subject, original)
    if "llama" in parts and llama_cpp.available():
        rows += llama_rows(subject, original)
    elif "llama" in parts:
        say("llama.cpp is left out: pip install llama-cpp-python")
    publish(arguments, work, rows, "runtime")


if __name__ == "__main__":
    entry(main)
