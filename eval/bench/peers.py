"""Ours against llm-compressor: same model, token ids and settings, fresh processes in turn.

Measures SparseGPT 2:4, Wanda 2:4 and GPTQ (4 bit, symmetric, groups of 64) on SmolLM2-135M-Instruct
in float32 on the CPU, calibrated with 64 x 512 tokens of WikiText-2 raw train, tested on the first
32,768 tokens of its test split in windows of 1,024. Time and peak memory are of the whole process;
ours also verifies its checkpoint within it. One evaluator loads and measures both results.
"""

from __future__ import annotations

import json
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress.errors import CompressError
from compress.eval.bench.options import entry, parser, publish, say, work_folder
from compress.eval.bench.peer_environment import PACKAGE, VERSION, peer_python
from compress.eval.bench.peer_material import FULL, SMOKE, TEXT, Material, prepare
from compress.eval.bench.process import measure
from compress.eval.bench.provenance import DEFAULT, NO_TRAINING
from compress.eval.bench.rows import Row
from compress.eval.bench.runs import remembered, run_measured, write_recipe
from compress.eval.quality.perplexity import perplexity
from compress.models.sources.source import load_model
from compress.system.tables import print_table

CODE = (*DEFAULT, *NO_TRAINING)
PEER = f"llm-compressor {VERSION}"
TOOLS = ("ours", "peer")


@dataclass(frozen=True)
class Setting:
    """One method: what it is called, and the step of our recipe; peer_worker.py has the peer's.

    What both tools default to is written out: damping 0.01 and blocks of 128 columns for the two
    that use a Hessian, static activation order and min-max grids for GPTQ.
    """

    label: str
    step: dict[str, Any]


_HESSIAN = {"damping": 0.01, "block_size": 128}
SETTINGS = {
    "sparsegpt": Setting("SparseGPT 2:4", {"method": "sparsegpt", "pattern": "2:4", **_HESSIAN}),
    "wanda": Setting("Wanda 2:4", {"method": "wanda", "pattern": "2:4"}),
    "gptq": Setting(
        "GPTQ W4 g64",
        {
            "method": "gptq", "bits": 4, "group_size": 64, "symmetric": True, "actorder": True,
            "observer": "minmax", **_HESSIAN,
        },
    ),
}  # fmt: skip


def ours(
    name: str,
    material: Material,
    folder: Path,
    data_root: Path | None,
    compute: str,
    draw: int = 0,
) -> dict[str, Any]:
    """One run of ours; the recipe reads the text itself and must arrive at the same ids.

    Args:
        draw: from 1 on, a seed that draws other windows of the text.
    """
    scale = material.scale
    recipe = write_recipe(
        folder.parent,
        folder.name,
        model={"source": str(material.model)},
        calibration={
            "text": {**TEXT, "split": "train"},
            "samples": scale.samples,
            "length": scale.length,
            **({"selection": "random"} if draw else {}),
        },
        seed=draw,
        steps=[SETTINGS[name].step],
        output={"dtype": "float32"},
        compute=compute,
    )
    run = run_measured(recipe, folder, data_root)
    lock = json.loads((folder / "lock.json").read_text())
    if not draw and lock["must"]["calibration tokens"] != material.digest:
        raise CompressError(
            "the calibration ids that the other tool got", "other ones in our run",
            "Give the same --data-root, and empty the folder given with --work",
        )  # fmt: skip
    return {**vars(run.usage), "step_seconds": run.step_seconds, "model": str(run.model)}


def peer(name: str, material: Material, folder: Path, python: Path, compute: str) -> dict[str, Any]:
    """One run of llm-compressor, the model loaded in the type ``compute``."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    job = {
        "model": str(material.model), "tokens": str(material.tokens), "setting": name,
        "out": str(folder / "model"), "times": str(folder / "times.json"),
        "dtype": compute,
    }  # fmt: skip
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    worker = Path(__file__).with_name("peer_worker.py")
    command = [str(python), "-I", str(worker), str(path)]
    usage = measure(command, folder.with_name(folder.name + ".log"))
    times = json.loads((folder / "times.json").read_text())
    return {**vars(usage), "step_seconds": times["compress"], "model": job["out"]}


def score(folder: Path, material: Material) -> float:
    """Perplexity of a checkpoint: the one evaluator for both tools and the original."""
    model = load_model(folder, dtype=torch.float32)
    return perplexity(model, material.test_ids(), window=material.scale.window).perplexity


def run_one(
    tool: str,
    name: str,
    repeat: int,
    material: Material,
    work: Path,
    python: Path,
    data_root: Path | None,
    compute: str = "float32",
    draw: int = 0,
    scored: bool = True,
) -> dict[str, Any]:
    """Compress and score once; the checkpoint is removed when its perplexity is known.

    Args:
        compute: type of products in calibration passes of ours, of the whole model of the peer.
        draw: see :func:`ours`.
        scored: whether its perplexity is wanted.
    """
    suffix = "" if compute == "float32" else f"-{compute}"
    suffix += f"-draw{draw}" if draw else ""
    folder = work / f"{material.key}-{tool}-{name}-{repeat}{suffix}"

    def measured() -> dict[str, Any]:
        say(f"{SETTINGS[name].label}: {tool} in {compute}, run {repeat + 1}")
        if tool == "ours":
            result = ours(name, material, folder, data_root, compute, draw)
        else:
            result = peer(name, material, folder, python, compute)
        say(f"  {result['seconds']:.1f} s, peak {result['peak_bytes'] / 1e9:.2f} GB")
        checkpoint = Path(result.pop("model"))
        if scored:
            result["perplexity"] = score(checkpoint, material)
            say(f"  perplexity {result['perplexity']:.2f}")
        return result

    result = remembered(folder, measured)
    shutil.rmtree(folder, ignore_errors=True)
    return result


def rows_of(name: str, results: dict[str, list[dict[str, Any]]], command: str) -> list[Row]:
    """Absolute figures and ratios of one setting, medians over the repeats."""
    label = SETTINGS[name].label
    rows = []
    for key, what, unit, scale, bar in (
        ("perplexity", "perplexity", "", 1.0, 1.01),
        ("seconds", "time", "s", 1.0, 0.6),
        ("peak_bytes", "peak memory", "GB", 1e-9, 0.6),
    ):
        mine, theirs = (
            scale * statistics.median(run[key] for run in results[tool]) for tool in TOOLS
        )
        rows += [
            Row(
                figure=f"{label}: {what}", value=mine, unit=unit, op="<=", bar=None, peer=theirs,
                command=command,
            ),
            Row(
                figure=f"{label}: {what}, ours / {PEER}", value=mine / theirs, unit="", op="<=",
                bar=bar, peer=None, command=command,
            ),
        ]  # fmt: skip
    return rows


def print_runs(results: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """Every run, with the steps alone beside the whole process."""
    print_table(
        "runs: the whole process, and of it the step alone",
        ["setting", "tool", "seconds", "CPU seconds", "step seconds", "peak GB", "perplexity"],
        [
            [
                SETTINGS[name].label, {"ours": "compress", "peer": PEER}[tool],
                f"{run['seconds']:.1f}", f"{run['cpu_seconds']:.1f}", f"{run['step_seconds']:.1f}",
                f"{run['peak_bytes'] / 1e9:.3f}", f"{run['perplexity']:.3f}",
            ]
            for name, by_tool in results.items()
            for tool, runs in by_tool.items()
            for run in runs
        ],
        right=range(2, 7),
    )  # fmt: skip


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data-root", type=Path, help="local copies of data sets (docs/data.md)")
    options.add_argument(
        "--peer-python", type=Path, metavar="PATH",
        help=f"interpreter that has {PACKAGE} {VERSION} (default: an environment is made)",
    )  # fmt: skip
    options.add_argument("--repeats", type=int, default=1, help="runs of each tool; medians count")
    options.add_argument("--only", choices=sorted(SETTINGS), help="one setting")
    arguments = options.parse_args()
    if arguments.repeats < 1:
        options.error("--repeats must be at least 1")
    work = work_folder(arguments, "peers")
    python = peer_python(arguments.peer_python)
    root = arguments.data_root
    root = root.expanduser().absolute() if root else None
    material = prepare(work, SMOKE if arguments.smoke else FULL, root)
    dense = remembered(
        work / f"{material.key}-dense", lambda: {"perplexity": score(material.model, material)}
    )
    say(f"dense: perplexity {dense['perplexity']:.2f}")
    command = "python -m compress.eval.bench.peers"
    rows = [
        Row(
            figure="Dense: perplexity", value=dense["perplexity"], unit="", op="<=", bar=None,
            peer=None, command=command,
        )
    ]  # fmt: skip
    measured: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name in [arguments.only] if arguments.only else list(SETTINGS):
        runs: dict[str, list[dict[str, Any]]] = {tool: [] for tool in TOOLS}
        for repeat in range(arguments.repeats):
            # The order changes every time, so that neither tool always meets the warmer machine.
            for tool in TOOLS if repeat % 2 == 0 else TOOLS[::-1]:
                runs[tool].append(run_one(tool, name, repeat, material, work, python, root))
        measured[name] = runs
        rows += rows_of(name, runs, f"{command} --only {name}")
    print_runs(measured)
    publish(arguments, work, rows)
    # The figures are published: the next call measures anew.
    for path in work.glob(f"{material.key}-*.json"):
        if arguments.only is None or f"-{arguments.only}-" in path.name:
            path.unlink()


if __name__ == "__main__":
    entry(main)
