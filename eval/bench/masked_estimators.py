"""How many network evaluations the estimators of the likelihood bound need for one standard error.

Each estimator measures the same sequences many times with other masks. Its variance over these
repeats, times the evaluations that a measurement takes, is what it needs for a standard error of
one; the ratio of two estimators is the ratio of their needs at any standard error. The model is the
one that the recipe masked/digits (or masked/text) trains; `compress.eval.bench.masked` uses
the same one.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from compress.data.codebook import load_codebook
from compress.data.images import ImageSpec, load_images
from compress.data.text import load_text
from compress.data.tokens import token_stream
from compress.eval.bench.options import entry, parser, publish, say, work_folder
from compress.eval.bench.rows import Row
from compress.eval.bench.runs import run_once
from compress.eval.quality.denoising import Sequences, sequences
from compress.eval.quality.generator import text_sequences
from compress.eval.quality.likelihood import Estimator, likelihood_bound
from compress.generators import Denoiser, MaskedGeneration
from compress.models.sources.source import load_model, load_tokenizer
from compress.planning.recipe import read_recipe, split_evaluation

COMMAND = "python -m compress.eval.bench.masked_estimators --only {}"
BAR = 8.0  # times fewer evaluations
_WINDOW = 128  # tokens, of text
# Ours as the evaluation uses it, its plain form, and the integral with t drawn independently and
# spread over the draws (which is how MDLM evaluates).
KINDS: dict[str, tuple[Estimator, bool]] = {
    "k-uniform": ("k-uniform", True),
    "k-uniform without control variate": ("k-uniform", False),
    "integral": ("integral", False),
    "integral, t spread": ("integral-spread", False),
}


def variances(
    denoiser: Any, data: Sequences, mask_id: int, repeats: int, draws: int
) -> dict[str, float]:
    """Variance over repeats of each estimator of the bound, in (nats per token)^2."""
    found = {}
    for name, (estimator, control) in KINDS.items():
        values = torch.tensor(
            [
                likelihood_bound(
                    denoiser.logits, data, mask_id, draws=draws, estimator=estimator,
                    control=control, seed=seed, batch_size=256,
                ).nats
                for seed in range(repeats)
            ],
            dtype=torch.float64,
        )  # fmt: skip
        found[name] = float(values.var())
        say(f"{name}: mean {values.mean():.4f}, standard deviation {values.std():.4f} nats a token")
    return found


def rows_of(part: str, found: dict[str, float], evaluations: int) -> list[Row]:
    """Evaluations for a standard error of 0.01 nats a token, and the ratios."""

    def row(what: str, value: float, op: str = "<=", bar: float | None = None) -> Row:
        return Row(
            figure=f"likelihood bound, {part}: {what}", value=value, unit="", op=op, bar=bar,
            peer=None, command=COMMAND.format(part),
        )  # fmt: skip

    needed = {name: variance * evaluations / 0.01**2 for name, variance in found.items()}
    rows = [
        row(f"evaluations for a standard error of 0.01 nats a token, {name}", value)
        for name, value in needed.items()
    ]
    ours, plain = needed["k-uniform"], needed["k-uniform without control variate"]
    for name, bar in (("integral", BAR), ("integral, t spread", None)):
        rows += [
            row(f"k-uniform needs so many times fewer evaluations than {name}",
                needed[name] / ours, ">=", bar),
            row(f"k-uniform without control variate, times fewer than {name}",
                needed[name] / plain, ">="),
        ]  # fmt: skip
    return rows


def measure(part: str, work: Path, arguments: Namespace) -> list[Row]:
    """Train the model (once) and measure the estimators on its held-out data."""
    count, repeats = (8, 3) if arguments.smoke else (64, arguments.repeats)
    overrides = ["model.train.training.steps=4"] if arguments.smoke else []
    recipe = read_recipe(f"masked/{part}", ["steps=[]", *overrides])
    base = run_once(work, f"{part}-base", recipe.to_yaml(), arguments.data_root) / "base"
    model = load_model(base, dtype=torch.float32).eval()
    description = MaskedGeneration.of(model)
    data = _data(part, base, split_evaluation(recipe.evaluation), description, count)
    say(f"{part}: {len(data)} sequences of {int(data.lengths[0])} tokens, {repeats} repeats")
    found = variances(Denoiser(model), data, description.mask_id, repeats, draws=4)
    return rows_of(part, found, 4 * len(data))


def _data(
    part: str, base: Path, evaluation: tuple[Any, Any], description: MaskedGeneration, count: int
) -> Sequences:
    """The first ``count`` sequences that the recipe evaluates on."""
    source, spec = evaluation
    if part == "digits":
        images = load_images(ImageSpec(source=spec.images["source"], split="test"))
        rows = load_codebook(base).rows(images)[:count]
        return sequences(rows, fixed=description.fixed(rows))
    tokenizer, _ = load_tokenizer(base)
    tokens = token_stream(load_text(source), tokenizer, count * _WINDOW)
    return text_sequences(tokens, description, _WINDOW)


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "--only", choices=("digits", "text"), action="append", help="default: digits"
    )
    options.add_argument("--repeats", type=int, default=100, help="measurements an estimator")
    options.add_argument("--data-root", type=Path, help="not needed: both data sets are embedded")
    arguments = options.parse_args()
    if arguments.repeats < 2:
        options.error("--repeats must be at least 2")
    work = work_folder(arguments, "masked")
    rows = [row for part in arguments.only or ["digits"] for row in measure(part, work, arguments)]
    publish(arguments, work, rows, "masked")


if __name__ == "__main__":
    entry(main)
