"""Learned widths (`vib`) on SST-2, against magnitude, the project's own width steps, Torch-Pruning.

The MiniLM-L6 encoder of a PyPI wheel (22.7M parameters, 11.9M of them embeddings) is fine-tuned on
SST-2, then 30, 50 and 70 % of all its parameters are removed. Accuracy is that on the 872 sentences
of the validation set. What `full` is compared with fine-tunes with the same loss, rates and batches
for as many steps as `full` takes in all, each of its steps of gates counted twice. Torch-Pruning
draws from all training sentences, the others from 32,768 of them. Parts, each resumable:

    --only fine_tune      the model that all others begin with
    --only full | fast | faster
                          the modes, by the shipped recipes
    --only magnitude | width
                          `ffn_width` and `head_width`, by magnitude without correction, and as they
                          are; they leave embeddings alone, so 40 % is the most that they remove
    --only torch_pruning  Taylor importance, in an environment of its own
    --only ratios         the bars, from the rows that the other parts have written
    --only speed          prefill of `full` at 50 % in 15 pairs

What is measured on SmolLM2 is in `compress.eval.bench.vib_smollm2`.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from compress.eval.bench.masked_models import row
from compress.eval.bench.options import entry, parser, publish, results, say, work_folder
from compress.eval.bench.peer_environment import TORCH_PRUNING, peer_python
from compress.eval.bench.provenance import DEFAULT
from compress.eval.bench.rows import Row, read_rows
from compress.eval.bench.runs import run_once, run_usage
from compress.eval.bench.vib_outcomes import (
    ACCURACY,
    LOST,
    REMOVED,
    SIZE,
    TIME,
    Outcome,
    equal_accuracy,
    line,
)
from compress.eval.bench.vib_torch_pruning import torch_pruned
from compress.eval.cost.latency import paired_latency
from compress.eval.report import load_report
from compress.models.sources.source import load_model
from compress.planning.recipe import parse_recipe, read_recipe
from compress.train.options import TrainingOptions

COMMAND = "python -m compress.eval.bench.vib --only {}"
CODE = (
    *DEFAULT, "recipes/vtrans", "recipes/classify", "eval/bench/vib_outcomes.py",
    "eval/bench/vib_torch_pruning.py", "eval/bench/torch_pruning_worker.py",
    ":!compress/generators", ":!compress/methods/quantize", ":!compress/methods/sparsity",
    ":!compress/methods/factorize", ":!compress/methods/depth", ":!compress/linear/packed.py",
    ":!compress/linear/tinygemm.py", ":!compress/runtimes",
)  # fmt: skip
LABEL = "SST-2"
SHARES = (0.5, 0.3, 0.7)  # of all parameters; the first one has the bars
WIDTH_SHARES = (0.2, 0.3, 0.4)  # what widths alone reach
MODES, BASELINES = ("full", "fast", "faster"), ("magnitude", "width", "torch_pruning")
PARTS = ("fine_tune", *MODES, *BASELINES, "ratios", "speed")
_QUALITY = ("evaluation.memory=false", "evaluation.latency=false")
_SMALL = ("calibration.samples=64", "evaluation.examples.limit=64")
_FEW = {"steps": 4, "warmup": 0}
_WIDTHS = {"magnitude": {"importance": "magnitude", "correction": False}, "width": {}}


def _base(work: Path, arguments: Namespace) -> Path:
    """Folder of the model that every method begins with."""
    if arguments.base is not None:
        return arguments.base.expanduser().resolve()
    return _fine_tuned(work, arguments) / "base"


def _fine_tuned(work: Path, arguments: Namespace) -> Path:
    small = (*_SMALL, "model.train.training.steps=4") if arguments.smoke else ()
    recipe = read_recipe("classify/minilm-sst2", ["steps=[]", *small])
    return run_once(work, "fine-tune", recipe.to_yaml(), arguments.data_root)


def _evaluated(work: Path, arguments: Namespace) -> Path:
    """The run that only evaluates a fine-tuned model."""
    small = _SMALL if arguments.smoke else ()
    overrides = [f"model={_base(work, arguments)}", "steps=[]", *_QUALITY, *small]
    recipe = read_recipe("classify/minilm-sst2", overrides)
    return run_once(work, "dense", recipe.to_yaml(), arguments.data_root)


def fine_tune(work: Path, arguments: Namespace) -> list[Row]:
    """The dense model: its accuracy, and what it took; of a given one the accuracy alone."""
    command = COMMAND.format("fine_tune")
    if arguments.base is None:
        out = _fine_tuned(work, arguments)
    else:
        out, command = _evaluated(work, arguments), f"{command} --base DIR"
    dense = load_report(out / "report.json").after
    score = dense.labels.scores["accuracy"]
    low, high = score.interval
    percent: dict[str, Any] = {"unit": "%", "op": ">="}
    rows = [
        row(command, f"{LABEL}, dense: {ACCURACY}", 100 * score.value, bar=90.0, **percent),
        row(command, f"{LABEL}, dense: {ACCURACY}, from", 100 * low, **percent),
        row(command, f"{LABEL}, dense: {ACCURACY}, to", 100 * high, **percent),
    ]
    if arguments.base is None and (usage := run_usage(out)) is not None:
        minutes = usage.cpu_seconds / 60
        rows.append(row(command, f"{LABEL}, dense: processor time of the whole run", minutes,
                        unit="min", bar=15.0))  # fmt: skip
    return rows


def _curve(
    part: str, shares: tuple[float, ...], measured: Callable[[float, int], Outcome],
    work: Path, arguments: Namespace,
) -> list[Row]:  # fmt: skip
    """One method at all sizes, published as each is measured."""
    rows: list[Row] = []
    wanted = [share for share in shares if share in (arguments.share or shares)]
    for share in wanted[:1] if arguments.smoke else wanted:
        outcomes = [measured(share, seed) for seed in range(arguments.seeds)]
        bars = {"lost": 2.0} if (part, share) == ("full", SHARES[0]) else {}
        rows += line(COMMAND.format(part), _label(part, share), outcomes, share, **bars)
        publish(arguments, work, rows, "vib", whole=False)
    return rows if wanted == [*shares] else []


def _label(part: str, share: float) -> str:
    return f"{LABEL}, {part.replace('_', '-')} -{round(100 * share)} %"


def _run(
    work: Path, name: str, steps: list[dict[str, Any]], seed: int, arguments: Namespace
) -> Path:
    """The run of these steps on the fine-tuned model; all else is the recipe's of `full`."""
    overrides = [f"model={_base(work, arguments)}", f"seed={seed}", *_QUALITY]
    recipe = read_recipe("vtrans/minilm-sst2-full", overrides + [*_SMALL] * arguments.smoke)
    changed = recipe.model_dump(mode="json", by_alias=True) | {"steps": steps}
    text = parse_recipe(changed).to_yaml()
    return run_once(work, f"{name}-seed{seed}", text, arguments.data_root)


def _of_mode(work: Path, part: str, share: float, seed: int, arguments: Namespace) -> Path:
    """The run of a mode's recipe at one size."""
    base = _base(work, arguments)
    overrides = [f"model={base}", f"seed={seed}", f"steps.0.share={share}", *_QUALITY]
    if arguments.smoke:
        step = read_recipe(f"vtrans/minilm-sst2-{part}").steps[0]
        trained = [name for name in ("training", "fine_tune") if getattr(step, name) is not None]
        overrides += [*_SMALL, *(f"steps.0.{name}.steps=4" for name in trained)]
    text = read_recipe(f"vtrans/minilm-sst2-{part}", overrides).to_yaml()
    return run_once(work, f"{part}-{round(100 * share)}-seed{seed}", text, arguments.data_root)


def mode(part: str, work: Path, arguments: Namespace) -> list[Row]:
    """One mode, by its recipe."""

    def measured(share: float, seed: int) -> Outcome:
        return Outcome.of_run(_of_mode(work, part, share, seed, arguments))

    return _curve(part, SHARES, measured, work, arguments)


def _training(arguments: Namespace) -> TrainingOptions:
    """The fine-tuning of what is compared with `full`: as its own, and longer by what the gates
    take, a step of which costs about as much as two of a narrow model."""
    step = read_recipe("vtrans/minilm-sst2-full").steps[0]
    more = {"steps": step.fine_tune.steps + 2 * step.training.steps}
    return step.fine_tune.model_copy(update=_FEW if arguments.smoke else more)


def widths(part: str, work: Path, arguments: Namespace) -> list[Row]:
    """Fewer heads and neurons in every block, then the fine-tuning."""
    config = AutoConfig.from_pretrained(_base(work, arguments))
    training = _training(arguments).model_dump(mode="json")
    distillation = {"labels": 1.0, "logits": 1.0}

    def measured(share: float, seed: int) -> Outcome:
        heads, neurons = _kept(config, share)
        steps = [
            {"method": "head_width", "keep": heads, **_WIDTHS[part]},
            {"method": "ffn_width", "keep": neurons, **_WIDTHS[part]},
            {"method": "distill", "scope": "model", "outer": True, "training": training,
             "distillation": distillation},
        ]  # fmt: skip
        return Outcome.of_run(
            _run(work, f"{part}-{round(100 * share)}", steps, seed, arguments)
        )  # fmt: skip

    return _curve(part, WIDTH_SHARES, measured, work, arguments)


def _kept(config: Any, share: float) -> tuple[int, int]:
    """Heads and neurons of a block with which a share of all parameters of a BERT is gone.

    Heads go by the share of the blocks' weights that has to go; neurons meet the size.
    """
    hidden, blocks = config.hidden_size, config.num_hidden_layers
    size = hidden // config.num_attention_heads
    of_head, of_neuron = 4 * hidden * size + 3 * size, 2 * hidden + 1
    inside = config.num_attention_heads * of_head + config.intermediate_size * of_neuron
    outside = (
        hidden * (config.vocab_size + config.max_position_embeddings + config.type_vocab_size + 2)
        + hidden * (hidden + 1) + config.num_labels * (hidden + 1) + 6 * hidden * blocks
    )  # fmt: skip
    gone = share * (blocks * inside + outside) / blocks
    heads = max(1, round(config.num_attention_heads * (1 - gone / inside)))
    left = inside - gone - heads * of_head
    return heads, max(1, int(left // of_neuron))


def torch_pruning(work: Path, arguments: Namespace) -> list[Row]:
    """Taylor importance over all channels, heads and neurons, then the fine-tuning."""
    python = peer_python(arguments.peer_python, TORCH_PRUNING)
    base, training = _base(work, arguments), _training(arguments)
    limit = 64 if arguments.smoke else None

    def measured(share: float, seed: int) -> Outcome:
        return torch_pruned(work, python, base, share, training, seed, arguments.data_root, limit)

    return _curve("torch_pruning", SHARES, measured, work, arguments)


def ratios(work: Path, arguments: Namespace) -> list[Row]:
    """The bars, from the rows that the other parts have written."""
    found = {line.figure: line.value for line in read_rows(results(arguments, work, "vib"))}
    command, first, rows = COMMAND.format("ratios"), SHARES[0], []

    def figure(part: str, share: float, what: str) -> float | None:
        return found.get(f"{_label(part, share)}: {what}")

    sizes = [figure(part, share, SIZE) for part in MODES for share in SHARES]
    if known := [abs(value - 1) for value in sizes if value is not None]:
        rows.append(row(command, f"{LABEL}, most of what was measured: size off the target",
                        100 * max(known), unit="%", bar=0.5))  # fmt: skip
    pairs = [[figure(part, first, what) for part in ("full", "faster")] for what in (TIME, LOST)]
    if None not in pairs[0] + pairs[1]:
        (slow, quick), (least, most) = pairs
        label = f"{LABEL}, -{round(100 * first)} %"
        rows += [
            row(command, f"{label}: time of full / of faster", slow / quick, op=">=", bar=10.0),
            row(command, f"{label}: {ACCURACY} that faster loses against full", most - least,
                unit="points", bar=2.0),
        ]  # fmt: skip
    dense = found.get(f"{LABEL}, dense: {ACCURACY}")
    curves = {}
    for part in ("full", *BASELINES):
        shares = WIDTH_SHARES if part in _WIDTHS else SHARES
        points = [(figure(part, s, REMOVED), figure(part, s, ACCURACY)) for s in shares]
        curves[part] = [point for point in points if None not in point]
    return rows + ([] if dense is None else equal_accuracy(command, LABEL, dense, curves))


def speed(work: Path, arguments: Namespace) -> list[Row]:
    """Forward of one text of 512 tokens, against the dense model."""
    out = _of_mode(work, "full", SHARES[0], 0, arguments)
    original = load_model(_base(work, arguments), dtype=torch.float32)
    smaller = load_model(out / "model", dtype=torch.float32)
    say("15 pairs of prefill")
    paired = paired_latency(original, smaller, repeats=3 if arguments.smoke else 15)
    command, label = COMMAND.format("speed"), f"{_label('full', SHARES[0])}, paired"
    low, high = paired.prefill.interval
    return [
        row(command, f"{label}: prefill speed-up", paired.prefill.speedup, unit="x", op=">=",
            bar=1.6),
        row(command, f"{label}: prefill speed-up, from", low, unit="x", op=">="),
        row(command, f"{label}: prefill speed-up, to", high, unit="x", op=">="),
    ]  # fmt: skip


PART_FUNCTIONS: dict[str, Callable[[Path, Namespace], list[Row]]] = {
    "fine_tune": fine_tune, "torch_pruning": torch_pruning, "ratios": ratios, "speed": speed,
    **{part: partial(mode, part) for part in MODES},
    **{part: partial(widths, part) for part in _WIDTHS},
}  # fmt: skip


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", choices=PARTS, action="append", help="default: all parts")
    options.add_argument("--data-root", type=Path, help="local copies of data sets (docs/data.md)")
    options.add_argument("--base", type=Path, metavar="DIR",
                         help="a fine-tuned model of an earlier run, to begin with")  # fmt: skip
    options.add_argument("--share", type=float, action="append", help="only these sizes")
    options.add_argument("--seeds", type=int, default=1, help="of each method (default: 1)")
    options.add_argument("--peer-python", type=Path, metavar="PATH",
                         help="interpreter that has Torch-Pruning")  # fmt: skip
    arguments = options.parse_args()
    work = work_folder(arguments, "vib")
    for part in arguments.only or PARTS:
        publish(arguments, work, PART_FUNCTIONS[part](work, arguments), "vib")


if __name__ == "__main__":
    entry(main)
