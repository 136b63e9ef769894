"""Masked generators: what they learn, what compression costs them, what samples show of it.

--only digits        the demo: time, class accuracy and Frechet distance, before and after
--only calibration   statistics of masked inputs against statistics of clean ones
--only text          a masked diffusion model of bytes: its bound, a bigram model's, 2:4 masks
--only rxnfp         a BERT adapted to all mask ratios (needs --data-root)

Every method on the same model: compress.eval.bench.masked_methods.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from compress.data.text import load_text
from compress.data.tokens import token_stream
from compress.eval.bench.bigram import bigram_nll, bits_per_byte
from compress.eval.bench.masked_models import (
    base_model,
    bound,
    judgement,
    macs,
    on_base,
    row,
    run_report,
    smaller,
)
from compress.eval.bench.options import entry, parser, publish, work_folder
from compress.eval.bench.provenance import DEFAULT
from compress.eval.bench.rows import Row
from compress.planning.recipe import Recipe, read_recipe, split_evaluation

_COMMAND = "python -m compress.eval.bench.masked --only {}"
CODE = (*DEFAULT, "recipes/masked")
_PARTS = ("digits", "calibration", "text", "rxnfp")
_SAMPLES = "evaluation.generator.samples=2000"
_NO_SAMPLES = "evaluation.generator.samples=0"
_TIMED = "evaluation.cache=false"  # a run that is timed measures everything itself
_SPARSEGPT = {"method": "sparsegpt", "pattern": "2:4"}
_CALIBRATED = {
    "SparseGPT 2:4": _SPARSEGPT,
    "GPTQ 4 bit": {"method": "gptq", "bits": 4, "group_size": 32},
    "FFN width -50 %": {"method": "ffn_width", "share": 0.5},
}


def _row(part: str, figure: str, value: float, **more: Any) -> Row:
    return row(_COMMAND.format(part), figure, value, **more)


def digits(work: Path, arguments: Namespace) -> list[Row]:
    """The demo of `make masked-demo`, judged on more samples."""
    rows, seconds = [], 0.0
    more = [_TIMED] if arguments.smoke else [_TIMED, _SAMPLES]
    for name in ("digits", "digits-4bit"):
        overrides = [*smaller(arguments.smoke), *more]
        if rows:  # as the demo does: the second recipe takes the model that the first has trained
            overrides = [
                f"model={base_model(work, 'digits', arguments)}",
                *overrides[1 if arguments.smoke else 0 :],
            ]
        report = run_report(work, name, read_recipe(f"masked/{name}", overrides), arguments)
        before, after = report.before, report.after
        first, second = judgement(before), judgement(after)
        label = f"digits, {name}"
        sizes = before.cost.size.block_bytes / after.cost.size.block_bytes
        saved = macs(before) / macs(after)
        seconds += report.run.seconds or 0.0
        strict = name == "digits"
        rows += [
            _row("digits", f"{label}: class accuracy lost",
                 100 * (first.accuracy - second.accuracy), unit="points",
                 bar=3.0 if strict else None),
            _row("digits", f"{label}: Frechet distance, after / before",
                 second.frechet / first.frechet, bar=1.1 if strict else None),
            _row("digits", f"{label}: bytes of block weights, before / after", sizes, op=">=",
                 bar=2.0 if strict else None),
            _row("digits", f"{label}: MACs, before / after", saved, op=">=",
                 bar=1.5 if strict else None),
            _row("digits", f"{label}: bound, after - before", bound(after) - bound(before),
                 unit="nats a token"),
        ]  # fmt: skip
        if strict:
            encoder = before.generator.generation.encoder
            rows += [
                _row("digits", "digits, dense: class accuracy of samples", 100 * first.accuracy,
                     unit="%", op=">=", bar=90.0),
                _row("digits", "digits: test accuracy of the classifier",
                     100 * encoder.test_accuracy, unit="%", op=">="),
            ]  # fmt: skip
    rows.append(_row("digits", "digits, both recipes: time", seconds / 60, unit="min", bar=12.0))
    return rows


def calibration(work: Path, arguments: Namespace) -> list[Row]:
    """What it costs to calibrate a masked generator on inputs without masks."""
    rows = []
    for name, step in _CALIBRATED.items():
        lost = {}
        for kind, ratio in (("masked", '"stratified"'), ("clean", "0")):
            slug = f"{step['method']}-{kind}"
            report = on_base(
                work, "digits", slug, [step], arguments, f"calibration.mask_ratio={ratio}"
            )
            lost[kind] = bound(report.after) - bound(report.before)
            rows.append(
                _row("calibration", f"digits model, {name}, calibrated on {kind} inputs: bound, "
                     "after - before", lost[kind], unit="nats a token")
            )  # fmt: skip
    return rows


def _bigram_bits(recipe: Recipe, base: Path) -> float:
    """Bits a byte of the evaluation text under a bigram model of the training text."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    seen = load_text(recipe.model.train.text)
    given, spec = split_evaluation(recipe.evaluation)
    train = token_stream(seen, tokenizer)
    test = token_stream(load_text(given), tokenizer, spec.max_tokens)
    count = len(tokenizer.decode(test).encode())
    return bits_per_byte(bigram_nll(train, test, len(tokenizer)), len(test), count)


def text(work: Path, arguments: Namespace) -> list[Row]:
    """A masked diffusion model of bytes."""
    base = base_model(work, "text", arguments)
    recipe = read_recipe("masked/text")
    pruned = on_base(work, "text", "sparsegpt", [_SPARSEGPT], arguments, _NO_SAMPLES)
    dense, worst = bound(pruned.before), bound(pruned.after)
    bits = pruned.before.generator.likelihood.bits_per_byte
    bigram = _bigram_bits(recipe, base)
    return [
        _row("text", "text model: bound", bits, unit="bits a byte"),
        _row("text", "text, bigram model of the same tokens", bigram, unit="bits a byte"),
        _row("text", "text model: bound / bigram model", bits / bigram, bar=0.85),
        _row("text", "text model, SparseGPT 2:4: bound, after - before", worst - dense,
             unit="nats a token"),
        *_learned_on_text(work, arguments, dense, worst),
    ]  # fmt: skip


def _learned_on_text(work: Path, arguments: Namespace, dense: float, worst: float) -> list[Row]:
    """Masks learned on the text model: block by block, and all together from all of the training
    text with the dense model as teacher."""
    common = {"learning_rate": 3e-3, "final_ratio": 0.1, "betas": [0.9, 0.95], "clip": None}
    budgets = {"block": {"steps": 400, "batch": 4}, "model": {"steps": 3500, "batch": 16}}
    rows = []
    for scope, budget in budgets.items():
        training = common | (budget if not arguments.smoke else {"steps": 2, "batch": 2})
        step = {"method": "maskllm", "pattern": "2:4", "scope": scope, "training": training}
        overrides = [_NO_SAMPLES]
        if scope == "model":
            step |= {"kappa": [300, 500], "tau": [2, 0.05], "regularization": 0,
                     "distillation": {"labels": 0.25, "logits": 0.75}}  # fmt: skip
            overrides += [] if arguments.smoke else ["calibration.samples=2560"]
        name = "maskllm" if scope == "block" else "maskllm-distilled"
        report = on_base(work, "text", name, [step], arguments, *overrides)
        best = bound(report.after)
        label = f"text model, 2:4 masks learned in {scope} scope"
        rows += [
            _row("text", f"{label}: bound, after - before", best - dense, unit="nats a token"),
            _row("text", f"{label}: share of SparseGPT's gap closed",
                 (worst - best) / (worst - dense), op=">=", bar=0.5),
        ]  # fmt: skip
    return rows


def rxnfp(work: Path, arguments: Namespace) -> list[Row]:
    """A masked language model before and after its adaptation to all mask ratios."""
    base = base_model(work, "rxnfp", arguments)
    small = smaller(arguments.smoke)[1:]
    small.append(_NO_SAMPLES)
    adapted = read_recipe("masked/rxnfp", [f"model={base}", "steps=[]", *small])
    source = read_recipe("masked/rxnfp").model.train.from_
    original = read_recipe(
        "masked/rxnfp", [f"model={source}", "steps=[]", "evaluation.objective=masked", *small]
    )
    found = {}
    for name, recipe in (("adapted", adapted), ("original", original)):
        # A run without steps has one model to speak of, and it comes out at the end.
        result = run_report(work, f"rxnfp-{name}", recipe, arguments).after
        found[name] = {score.ratio: score for score in result.generator.recovery}
    return [
        _row("rxnfp", f"rxnfp, {100 * ratio:.0f} % masked: cross entropy, adapted / original",
             found["adapted"][ratio].cross_entropy / found["original"][ratio].cross_entropy,
             bar=1.0 if ratio >= 0.5 else None)
        for ratio in sorted(found["adapted"])
    ]  # fmt: skip


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", choices=_PARTS, action="append", help="default: all parts")
    options.add_argument("--data-root", type=Path, help="local copies of data sets (docs/data.md)")
    arguments = options.parse_args()
    work = work_folder(arguments, "masked")
    for part in arguments.only or _PARTS:
        publish(arguments, work, globals()[part](work, arguments), "masked")


if __name__ == "__main__":
    entry(main)
