"""What a stranger brings: model types that no table names, a text and tasks of their own, a wheel.

    python -m compress.eval.bench.strangers [--only models|metrics|mixture|wheel]

*models*: a small random model of each of twelve types without an entry in the table of families is
looked at, planned, compressed by three methods, evaluated, and what was written is opened in an
interpreter that has only imported the package: its logits are those of the same steps on the live
model. *metrics*: scores of labels beside scikit-learn's and scipy's. *mixture*: see
``strangers_mixture.py``. *wheel*: the wheel is installed into an empty environment, and five
commands lead from there to two runs on a text, compared.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import venv
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

import compress
from compress.checkpoint.fresh import kept_process, prove_fresh
from compress.errors import CompressError
from compress.eval.bench.options import entry, parser, publish, say, work_folder
from compress.eval.bench.provenance import DEFAULT, ROOT, code_key
from compress.eval.bench.robust.families import byte_tokenizer, live_logits, sized_config
from compress.eval.bench.rows import Row
from compress.eval.bench.strangers_mixture import mixture
from compress.models.families import FAMILIES

CODE = (*DEFAULT, "eval/bench/robust/families.py", "eval/bench/strangers_mixture.py")
COMMAND = "python -m compress.eval.bench.strangers"
# Type of a model, and the head that it is given.
MODELS = {
    "arcee": "CausalLM", "olmo3": "CausalLM", "nemotron": "CausalLM", "seed_oss": "CausalLM",
    "phi": "CausalLM", "bloom": "CausalLM", "mpt": "CausalLM", "xglm": "CausalLM",
    "eurobert": "MaskedLM", "megatron-bert": "MaskedLM", "ernie": "SequenceClassification",
    "roformer": "TokenClassification",
}  # fmt: skip
STEPS: dict[str, dict[str, Any]] = {
    "wanda 2:4": {"method": "wanda", "pattern": "2:4"},
    "svd": {"method": "svd", "ratio": 0.6},
    "gptq 4 bits": {"method": "gptq", "bits": 4, "group_size": 16},
}
LABELS = ("O", "B-ANIMAL")
SENTENCE = "a quick brown fox jumps over the lazy dog and is gone . "

RECIPE: dict[str, Any] = {
    "name": "mine",
    "model": {
        "train": {
            "architecture": {
                "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
                "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128,
            },
            "tokenizer": {"kind": "bytes"},
            "text": {"source": "mine.txt", "part": "head:0.8"},
            "length": 64,
            "training": {"steps": 100, "batch": 16, "learning_rate": 0.003},
        }
    },
    "calibration": {
        "text": {"source": "mine.txt", "part": "head:0.8"}, "samples": 32, "length": 64,
    },
    "steps": [{"method": "sparsegpt", "pattern": "2:4"}],
    "evaluation": {"text": {"source": "mine.txt", "part": "tail:0.2"}, "window": 64},
}  # fmt: skip
OTHER = "[{method: gptq, bits: 4, group_size: 32}]"


def models(work: Path, smoke: bool) -> list[Row]:
    """Twelve types; one that is done with this code is not done again."""
    listed = {kind: head for kind, head in MODELS.items() if kind not in FAMILIES}
    tried = dict(list(listed.items())[:1]) if smoke else listed
    sound, logits = 0, 0
    with kept_process():
        for kind, head in tried.items():
            record = work / f"{kind}-{code_key()}.json"
            if not record.exists():
                found = _stranger(kind, head, work / kind)
                shutil.rmtree(work / kind, ignore_errors=True)
                record.write_text(json.dumps(found, indent=1), encoding="utf-8")
            found = json.loads(record.read_text(encoding="utf-8"))
            say(f"{kind} ({head}): {found}")
            sound += set(found.values()) == {"equal"}
            logits += sum(value == "equal" for value in found.values())
    command = f"{COMMAND} --only models"
    return [
        _row("model types without an entry that pass everything", sound, command, ">=", 12),
        _row("runs of three methods on them with equal logits in a fresh process", logits, command,
             ">=", 36),
    ]  # fmt: skip


def _stranger(kind: str, head: str, work: Path) -> dict[str, str]:
    """Method -> "equal", or what went wrong."""
    shutil.rmtree(work, ignore_errors=True)
    source = work / "source"
    model = _model(kind, head)
    model.save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    data, measured = _data(head, work)
    try:
        if compress.inspect(source)["family"] != "inferred":
            return {"inspect": "a family that somebody described"}
    except CompressError as error:
        return {"inspect": str(error)}
    found = {}
    for name, step in STEPS.items():
        recipe = {
            "name": kind, "model": str(source), "steps": [step], "device": "cpu",
            "calibration": {**data, "samples": 8, "length": 24},
            "evaluation": {**measured, "latency": False, "memory": False},
        }  # fmt: skip
        try:
            compress.plan(recipe)
            result = compress.run(recipe, work / name.replace(" ", "-"))
            ids = torch.arange(7, 39).remainder(model.config.vocab_size)[None]
            expected = live_logits(source, recipe["steps"], recipe["calibration"], ids)
            prove_fresh(result.model, expected, {"input_ids": ids})
            told = result.report.before is not None and result.report.after is not None
            found[name] = "equal" if told else "no report"
        except Exception as error:  # a traceback is a failure too
            found[name] = f"{type(error).__name__}: {error}"
    return found


def _model(kind: str, head: str) -> Any:
    """A small model with random weights, no two of them alike."""
    import transformers

    config = sized_config(kind)
    if head.endswith("Classification"):
        config.id2label = dict(enumerate(LABELS))
        config.label2id = {name: number for number, name in enumerate(LABELS)}
    torch.manual_seed(0)
    model = getattr(transformers, f"AutoModelFor{head}").from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.config.architectures = [type(model).__name__]
    return model


def _data(head: str, work: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What such a model is calibrated and measured on, in files of its user's own."""
    words = SENTENCE.split()
    if not head.endswith("Classification"):
        (work / "text.txt").write_text(SENTENCE * 300)
        text = {"text": {"source": str(work / "text.txt")}}
        return text, {**text, "window": 32, "max_tokens": 512}
    rows: list[dict[str, Any]]
    if head == "TokenClassification":
        tags = [LABELS[word in ("fox", "dog")] for word in words]
        rows = [{"tokens": words[i:] + words[:i], "label": tags[i:] + tags[:i]} for i in range(12)]
    else:
        rows = [{"text": " ".join(words[i:]), "label": LABELS[i % 2]} for i in range(12)]
    path = work / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = {"examples": {"source": str(path)}}
    return examples, examples


def metrics() -> list[Row]:
    """Largest difference of a score of labels from the same score of another library."""
    import numpy as np
    from scipy import stats
    from sklearn import metrics as theirs

    from compress.eval.quality import agreement

    worst: dict[str, float] = {}

    def compare(name: str, ours: float, other: float) -> None:
        worst[name] = max(worst.get(name, 0.0), abs(ours - float(other)))

    draw = np.random.default_rng(0)
    for classes in (2, 3, 7):
        for _ in range(20):
            right = draw.integers(classes, size=200)
            said = np.where(draw.random(200) < 0.6, right, draw.integers(classes, size=200))
            found = agreement.scores(right, said, classes)
            average = "binary" if classes == 2 else "macro"
            compare("accuracy", found["accuracy"][0], theirs.accuracy_score(right, said))
            compare("F1", found["f1"][0], theirs.f1_score(right, said, average=average))
            compare("Matthews", found["matthews"][0], theirs.matthews_corrcoef(right, said))
    for _ in range(20):
        right, noise = draw.integers(6, size=200) / 2.0, draw.normal(size=200)
        said = np.round(right + noise, 1)
        found = agreement.scores(right, said, 0)
        compare("Spearman", found["spearman"][0], stats.spearmanr(right, said).statistic)
        compare("Pearson", found["pearson"][0], stats.pearsonr(right, said).statistic)
    command = f"{COMMAND} --only metrics"
    return [
        _row(f"{name} of labels: largest difference from another library", value, command, "<=",
             1e-9)
        for name, value in sorted(worst.items())
    ]  # fmt: skip


def wheel(work: Path) -> list[Row]:
    """From the wheel to a compared pair of runs, in an environment of its own."""
    folder = work / "empty"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    built = _built(work)
    pages = sorted((ROOT / "docs").glob("*.md"))  # a text that any checkout has
    (folder / "mine.txt").write_text("\n".join(page.read_text() for page in pages))
    (folder / "mine.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    venv.create(folder / ".venv", with_pip=True)
    seconds = {}
    for name, command in _commands(folder, built):
        say(f"$ {' '.join(map(str, command))}")
        start = time.perf_counter()
        done = subprocess.run(
            command, cwd=folder, env=_environment(), capture_output=True, text=True
        )
        if done.returncode:
            raise CompressError(
                f"`{' '.join(map(str, command))}` to succeed", (done.stderr or done.stdout)[-800:]
            )
        seconds[name] = time.perf_counter() - start
    compared = json.loads((folder / "compare.json").read_text())["entries"]
    if sum(not row["original"] for row in compared) != 2:
        raise CompressError("two runs compared", f"{len(compared)} entries")
    command = f"{COMMAND} --only wheel"
    return [
        _row("commands from the wheel to a compared pair of runs", len(seconds), command, "<=", 5),
        _row("wheel to a compared pair: pip install", seconds.pop("install"), command, unit="s"),
        _row("wheel to a compared pair: the other commands", sum(seconds.values()), command,
             unit="s"),
    ]  # fmt: skip


def _built(work: Path) -> Path:
    """The wheel of this checkout."""
    target = work / "dist"
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", target, ROOT]
    subprocess.run(command, check=True)
    return next(target.glob("*.whl"))


def _commands(folder: Path, built: Path) -> Iterator[tuple[str, list[Any]]]:
    tool = folder / ".venv" / "bin" / "compress"
    # The versions that everything here is measured with; without them pip takes the newest.
    pinned = ["-c", ROOT / "constraints.txt"]
    yield "install", [folder / ".venv" / "bin" / "pip", "install", "-q", *pinned, built]
    yield "plan", [tool, "plan", "mine.yaml"]
    yield "first", [tool, "run", "mine.yaml", "--out", "zeros", "-q"]
    yield "second", [
        tool, "run", "mine.yaml", "--out", "bits", "-q", "--set", "model=zeros/base",
        "--set", f"steps={OTHER}",
    ]  # fmt: skip
    yield "compare", [tool, "compare", "zeros", "bits"]


def _environment() -> dict[str, str]:
    """The user's variables, without what would lead the new environment to this checkout."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def _row(
    figure: str, value: float, command: str, op: Any = "<=", bar: float | None = None,
    unit: str = "",
) -> Row:  # fmt: skip
    return Row(
        figure=f"strangers: {figure}", value=value, unit=unit, op=op, bar=bar, peer=None,
        command=command,
    )  # fmt: skip


def main() -> None:
    options = parser(__doc__)
    parts = ("models", "metrics", "mixture", "wheel")
    options.add_argument("--only", choices=parts, action="append", help="default: all")
    arguments: Namespace = options.parse_args()
    work = work_folder(arguments, "strangers")
    for part in arguments.only or parts:
        say(f"part {part}")
        if part == "models":
            rows = models(work, arguments.smoke)
        elif part == "mixture":
            rows = mixture(work, arguments.smoke)
        else:
            rows = metrics() if part == "metrics" else wheel(work)
        publish(arguments, work, rows, "strangers")


if __name__ == "__main__":
    entry(main)
