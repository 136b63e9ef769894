"""Kill -9 at random moments; the same command again must give the same bytes.

A llama of 8 blocks with random weights goes through a depth, a width, a sparsity and a precision
step. One run is left alone. Ten more are killed at moments drawn uniformly over its time, from the
start of the interpreter to the end; each is then started again by the same command and left to
finish. Every file of the checkpoint is compared by sha256.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import time
from collections import Counter
from pathlib import Path

import torch
from transformers import LlamaConfig

from compress.errors import CompressError
from compress.eval.bench.llama import write_llama
from compress.eval.bench.options import entry, parser, publish, say, work_folder
from compress.eval.bench.process import failed
from compress.eval.bench.provenance import DEFAULT, NO_TRAINING
from compress.eval.bench.rows import Row
from compress.eval.bench.runs import digests, journal, run_command, write_recipe

SHAPE = {
    "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 512,
}  # fmt: skip
STEPS = [
    {"method": "shortgpt", "remove": 1},
    {"method": "ffn_width", "share": 0.25, "round_to": 64},
    {"method": "wanda", "pattern": "2:4"},
    {"method": "gptq", "bits": 4, "group_size": 64},
]
CODE = (*DEFAULT, *NO_TRAINING)
COMMAND = "python -m compress.eval.bench.resume"


def start(command: list[str], log: Path) -> subprocess.Popen:
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)


def finish(command: list[str], log: Path) -> float:
    """Run to the end and return the seconds that took."""
    begin = time.perf_counter()
    if start(command, log).wait():
        raise failed(command, log)
    return time.perf_counter() - begin


def kill_within(command: list[str], log: Path, moment: float) -> bool:
    """Start a run and kill it ``moment`` seconds later; False if it was over by then."""
    process = start(command, log)
    try:
        status = process.wait(timeout=moment)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True
    if status:
        raise failed(command, log)
    return False


def stage(out: Path) -> str:
    """How far a killed run had come."""
    events = journal(out)
    if not events:
        return "before its first journal line"
    counts = Counter(event["event"] for event in events)
    listed = ", ".join(f"{count} {name}" for name, count in counts.items())
    return f"after {listed}"


def one_kill(recipe: Path, out: Path, seconds: float, generator: random.Random) -> Path:
    """Kill a run in ``out`` once and let the same command finish it; return the checkpoint."""
    log = out.with_name(out.name + ".log")
    command = run_command(recipe, out)
    for _ in range(20):
        shutil.rmtree(out, ignore_errors=True)
        log.unlink(missing_ok=True)
        moment = generator.uniform(0, seconds)
        if kill_within(command, log, moment):
            break
        say(f"  over before {moment:.1f} s; another moment is drawn")
    else:
        raise CompressError(
            "a run that lasts as long as the undisturbed one", "20 that were over before the kill",
            "Measure on a machine that is not busy with other things",
        )  # fmt: skip
    say(f"  killed at {moment:.1f} s of {seconds:.1f} s, {stage(out)}")
    finish(command, log)
    return out / "model"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--kills", type=int, default=None, help="killed runs (default 10)")
    options.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = options.parse_args()
    kills = arguments.kills or (2 if arguments.smoke else 10)
    work = work_folder(arguments, "resume")
    model = write_llama(
        work / "llama", LlamaConfig(**SHAPE, tie_word_embeddings=False), torch.float32
    )
    recipe = write_recipe(
        work,
        "resume",
        model={"source": str(model)},
        calibration={
            "text": {"source": "python:pydoc_data.topics"},
            "samples": 8 if arguments.smoke else 64,
            "length": 512,
        },
        steps=STEPS,
    )
    undisturbed = work / "undisturbed"
    shutil.rmtree(undisturbed, ignore_errors=True)
    log = work / "undisturbed.log"
    log.unlink(missing_ok=True)
    say("the undisturbed run")
    seconds = finish(run_command(recipe, undisturbed), log)
    expected = digests(undisturbed / "model")
    say(f"  {seconds:.1f} s, {len(expected)} files")
    generator = random.Random(arguments.seed)
    identical = 0
    for number in range(1, kills + 1):
        say(f"kill {number} of {kills}")
        found = digests(one_kill(recipe, work / "killed", seconds, generator))
        same = found == expected
        identical += same
        if not same:
            names = expected.keys() | found.keys()
            different = sorted(n for n in names if expected.get(n) != found.get(n))
            say(f"  DIFFERENT: {', '.join(different)}")
            shutil.rmtree(work / f"different-{number}", ignore_errors=True)
            (work / "killed").rename(work / f"different-{number}")
    row = Row(
        figure=f"Killed by SIGKILL {kills} times: runs that resume to the same bytes",
        value=identical, unit="", op=">=", bar=kills, peer=None, command=COMMAND,
    )  # fmt: skip
    publish(arguments, work, [row])
    for folder in (undisturbed, work / "killed"):
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    entry(main)
