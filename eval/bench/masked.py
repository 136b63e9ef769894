"""Masked generators: what they learn, what compression costs them, what samples show of it.

--only digits        the demo: time, class accuracy and Frechet distance, before and after
--only methods       every kind of method on the digits model
--only calibration   statistics of masked inputs against statistics of clean ones
--only text          a masked diffusion model of bytes: its bound, a bigram model's, 2:4 masks
--only rxnfp         a BERT adapted to all mask ratios (needs --data-root)
--only mnist         a larger model of images (needs --data-root; an hour)
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from compress.data.text import load_text
from compress.data.tokens import token_stream
from compress.recipe import Recipe, parse_recipe, read_recipe, split_evaluation
from eval.bench.bigram import bigram_nll, bits_per_byte
from eval.bench.options import entry, parser, publish, work_folder
from eval.bench.rows import Row
from eval.bench.runs import run_once
from eval.report import Report, load_report

_COMMAND = "python -m eval.bench.masked --only {}"
_PARTS = ("digits", "methods", "calibration", "text", "rxnfp")
_STEPS = 8  # of the sampler, where one number of steps stands for the curve
_SAMPLES = "evaluation.generator.samples=2000"
_NO_SAMPLES = "evaluation.generator.samples=0"
_METHODS: dict[str, dict[str, Any]] = {
    "magnitude 2:4": {"method": "magnitude", "pattern": "2:4"},
    "Wanda 2:4": {"method": "wanda", "pattern": "2:4"},
    "SparseGPT 2:4": {"method": "sparsegpt", "pattern": "2:4"},
    "maskllm 2:4": {"method": "maskllm", "pattern": "2:4"},
    "GPTQ 4 bit": {"method": "gptq", "bits": 4, "group_size": 32},
    "W8A8": {"method": "w8a8"},
    "FFN width -50 %": {"method": "ffn_width", "share": 0.5},
    "head width -50 %": {"method": "head_width", "share": 0.5},
    "depth -1 block": {"method": "shortgpt", "remove": 1},
    "SVD-LLM 70 %": {"method": "svd_llm", "ratio": 0.7},
}


def _row(part: str, figure: str, value: float, **more: Any) -> Row:
    base = {"unit": "", "op": "<=", "bar": None, "peer": None}
    return Row(figure=figure, value=value, command=_COMMAND.format(part), **(base | more))


def _report(work: Path, name: str, recipe: Recipe, arguments: Namespace) -> Report:
    out = run_once(work, name, recipe.to_yaml(), arguments.data_root)
    return load_report(out / "report.json")


def _images(result: Any, steps: int = _STEPS) -> Any:
    """The judgement of samples made in so many steps."""
    points = {point.steps: point for point in result.generator.generation.points}
    return points[min(points, key=lambda count: abs(count - steps))].images


def _bound(result: Any) -> float:
    return result.generator.likelihood.nats


def _macs(result: Any) -> float:
    """Multiply-accumulates a token at the length of the model's sequences."""
    macs = result.cost.macs
    unused = macs.context - result.generator.likelihood.window
    return macs.per_token - macs.per_token_and_position * unused


def _smaller(smoke: bool) -> list[str]:
    """Overrides of a recipe that trains its model."""
    if not smoke:
        return []
    return ["model.train.training.steps=4", "calibration.samples=64",
            "evaluation.generator.samples=20", "evaluation.generator.sequences=16"]  # fmt: skip


def _base(work: Path, part: str, arguments: Namespace) -> Path:
    """The model that a masked recipe trains, without any step; the whole recipe's, if it ran."""
    for done in (work / part / "base", work / f"{part}-base" / "base"):
        if (done / "training.json").exists():
            return done
    overrides = ["steps=[]", *_smaller(arguments.smoke)]
    recipe = read_recipe(f"masked/{part}", overrides)
    return run_once(work, f"{part}-base", recipe.to_yaml(), arguments.data_root) / "base"


def _on_base(
    work: Path, part: str, name: str, step: dict, arguments: Namespace, *overrides: str
) -> Report:
    """A step on a model that :func:`_base` has trained."""
    base = _base(work, part, arguments)
    small = _smaller(arguments.smoke)[1:]
    recipe = read_recipe(f"masked/{part}", [f"model={base}", *small, *overrides])
    changed = recipe.model_dump(mode="json", by_alias=True) | {"steps": [step]}
    return _report(work, f"{part}-{name}", parse_recipe(changed), arguments)


def digits(work: Path, arguments: Namespace) -> list[Row]:
    """The demo of `make masked-demo`, judged on more samples."""
    rows, seconds = [], 0.0
    more = [] if arguments.smoke else [_SAMPLES]
    for name in ("digits", "digits-4bit"):
        overrides = [*_smaller(arguments.smoke), *more]
        if rows:  # as the demo does: the second recipe takes the model that the first has trained
            overrides = [
                f"model={work / 'digits' / 'base'}",
                *overrides[1 if arguments.smoke else 0 :],
            ]
        report = _report(work, name, read_recipe(f"masked/{name}", overrides), arguments)
        before, after = report.before, report.after
        first, second = _images(before), _images(after)
        label = f"digits, {name}"
        sizes = before.cost.size.block_bytes / after.cost.size.block_bytes
        macs = _macs(before) / _macs(after)
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
            _row("digits", f"{label}: MACs, before / after", macs, op=">=",
                 bar=1.5 if strict else None),
            _row("digits", f"{label}: bound, after - before", _bound(after) - _bound(before),
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


def methods(work: Path, arguments: Namespace) -> list[Row]:
    """Every kind of method on the digits model, each alone."""
    rows = []
    for name, step in _METHODS.items():
        slug = name.lower().replace(" ", "-").replace(":", "of").replace("%", "")
        if arguments.smoke and step["method"] == "maskllm":
            step = step | {"training": {"steps": 2, "batch": 2}}
        report = _on_base(work, "digits", slug, step, arguments)
        before, after = report.before, report.after
        lost = 100 * (_images(before).accuracy - _images(after).accuracy)
        rows += [
            _row("methods", f"digits model, {name}: bound, after - before",
                 _bound(after) - _bound(before), unit="nats a token"),
            _row("methods", f"digits model, {name}: class accuracy lost", lost, unit="points"),
        ]  # fmt: skip
    return rows


def calibration(work: Path, arguments: Namespace) -> list[Row]:
    """What it costs to calibrate a masked generator on inputs without masks."""
    rows = []
    for name in ("SparseGPT 2:4", "GPTQ 4 bit", "FFN width -50 %"):
        lost = {}
        for kind, ratio in (("masked", '"stratified"'), ("clean", "0")):
            slug = f"{_METHODS[name]['method']}-{kind}"
            report = _on_base(
                work, "digits", slug, _METHODS[name], arguments, f"calibration.mask_ratio={ratio}"
            )
            lost[kind] = _bound(report.after) - _bound(report.before)
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
    base = _base(work, "text", arguments)
    recipe = read_recipe("masked/text")
    pruned = _on_base(work, "text", "sparsegpt", _METHODS["SparseGPT 2:4"], arguments, _NO_SAMPLES)
    dense, worst = _bound(pruned.before), _bound(pruned.after)
    bits = pruned.before.generator.likelihood.bits_per_byte
    bigram = _bigram_bits(recipe, base)
    return [
        _row("text", "text model: bound", bits, unit="bits a byte"),
        _row("text", "bigram model of the same tokens", bigram, unit="bits a byte"),
        _row("text", "text model: bound / bigram model", bits / bigram, bar=0.85),
        _row("text", "text model, SparseGPT 2:4: bound, after - before", worst - dense,
             unit="nats a token"),
        *_learned_on_text(work, arguments, dense, worst),
    ]  # fmt: skip


def _learned_on_text(work: Path, arguments: Namespace, dense: float, worst: float) -> list[Row]:
    """Masks learned on the text model, in both scopes."""
    common = {"learning_rate": 3e-3, "final_ratio": 0.1, "betas": [0.9, 0.95], "clip": None}
    budgets = {"block": {"steps": 400, "batch": 4}, "model": {"steps": 300, "batch": 16}}
    rows = []
    for scope, budget in budgets.items():
        training = common | (budget if not arguments.smoke else {"steps": 2, "batch": 2})
        step = {"method": "maskllm", "pattern": "2:4", "scope": scope, "training": training}
        if scope == "model":
            # A prior worth keeping: the noise starts below what it is ahead by.
            step |= {"kappa": [300, 500], "tau": [2, 0.05], "regularization": 0}
        name = "maskllm" if scope == "block" else "maskllm-model"
        report = _on_base(work, "text", name, step, arguments, _NO_SAMPLES)
        best = _bound(report.after)
        label = f"text model, 2:4 masks learned in {scope} scope"
        bar = 0.5 if scope == "model" else None
        rows += [
            _row("text", f"{label}: bound, after - before", best - dense, unit="nats a token"),
            _row("text", f"{label}: share of SparseGPT's gap closed",
                 (worst - best) / (worst - dense), op=">=", bar=bar),
        ]  # fmt: skip
    return rows


def rxnfp(work: Path, arguments: Namespace) -> list[Row]:
    """A masked language model before and after its adaptation to all mask ratios."""
    base = _base(work, "rxnfp", arguments)
    small = _smaller(arguments.smoke)[1:]
    small.append(_NO_SAMPLES)
    adapted = read_recipe("masked/rxnfp", [f"model={base}", "steps=[]", *small])
    source = read_recipe("masked/rxnfp").model.train.from_
    original = read_recipe(
        "masked/rxnfp", [f"model={source}", "steps=[]", "evaluation.objective=masked", *small]
    )
    found = {}
    for name, recipe in (("adapted", adapted), ("original", original)):
        # A run without steps has one model to speak of, and it comes out at the end.
        result = _report(work, f"rxnfp-{name}", recipe, arguments).after
        found[name] = {score.ratio: score for score in result.generator.recovery}
    return [
        _row("rxnfp", f"rxnfp, {100 * ratio:.0f} % masked: cross entropy, adapted / original",
             found["adapted"][ratio].cross_entropy / found["original"][ratio].cross_entropy,
             bar=1.0 if ratio >= 0.5 else None)
        for ratio in sorted(found["adapted"])
    ]  # fmt: skip


def mnist(work: Path, arguments: Namespace) -> list[Row]:
    """The MNIST recipe."""
    report = _report(
        work, "mnist", read_recipe("masked/mnist", _smaller(arguments.smoke)), arguments
    )
    rows = []
    for point in report.before.generator.generation.points:
        rows.append(
            _row("mnist", f"MNIST, dense, {point.steps} steps: class accuracy of samples",
                 100 * point.images.accuracy, unit="%", op=">=",
                 bar=95.0 if point.steps == _STEPS else None)
        )  # fmt: skip
    for point in report.after.generator.generation.points:
        rows.append(
            _row("mnist", f"MNIST, compressed, {point.steps} steps: class accuracy of samples",
                 100 * point.images.accuracy, unit="%", op=">=")
        )  # fmt: skip
    return rows


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "--only", choices=(*_PARTS, "mnist"), action="append", help="default: all but mnist"
    )
    options.add_argument("--data-root", type=Path, help="local copies of data sets (docs/data.md)")
    arguments = options.parse_args()
    work = work_folder(arguments, "masked")
    for part in arguments.only or _PARTS:
        publish(arguments, work, globals()[part](work, arguments), "masked")


if __name__ == "__main__":
    entry(main)
