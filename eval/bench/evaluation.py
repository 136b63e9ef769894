"""Our perplexity against lm-eval's rolling log-likelihood: same model, tokens and windows, in turn.

lm-eval puts a prefix token before the text and predicts the text in pieces of max_length tokens:
the inputs of a piece are the max_length tokens before its last one. That is what
`compress.eval.perplexity`
computes on the prefix token followed by the text with windows of max_length + 1 tokens that start
every max_length tokens: 32 forwards of 1,024 tokens, 32,768 predictions, each from the same inputs.
lm-eval gets the token ids themselves, so neither side spends time on a tokenizer. Both use one
model in memory with a batch of 1 (lm-eval's default).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from compress.eval.bench.options import entry, parser, publish, say, work_folder
from compress.eval.bench.peer_material import FULL, SMOKE, prepare
from compress.eval.bench.rows import Row
from compress.eval.quality.perplexity import perplexity
from compress.models.sources.source import load_model, load_tokenizer

COMMAND = "python -m compress.eval.bench.evaluation"
CODE = ("eval/quality", "compress/models/split_forward.py")
AGREEMENT = 5e-5  # relative difference of perplexities that are equal to four digits


def rolling_scorer(
    model: torch.nn.Module, tokenizer: object, ids: list[int], length: int
) -> tuple[Callable[[], float], int]:
    """lm-eval's mean negative log-likelihood of ``ids`` as a function, and its prefix token."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    class Given(HFLM):
        """Takes token ids for the text, whatever the text."""

        def tok_encode(self, string: str, *args: object, **kwargs: object) -> list[int]:
            return list(ids)

    lm = Given(
        pretrained=model, tokenizer=tokenizer, max_length=length, batch_size=1, device="cpu",
        dtype="float32",
    )  # fmt: skip
    request = Instance(request_type="loglikelihood_rolling", doc={}, arguments=("the text",), idx=0)

    def score() -> float:
        return -lm.loglikelihood_rolling([request], disable_tqdm=True)[0] / len(ids)

    return score, lm.prefix_token_id


def timed(function: Callable[[], float]) -> tuple[float, float]:
    start = time.perf_counter()
    value = function()
    return value, time.perf_counter() - start


def rows_of(ours: list[float], theirs: list[float], values: tuple[float, float]) -> list[Row]:
    """Speed as the median over pairs, and the agreement of the two perplexities."""
    speedup = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    mine, other = (float(torch.tensor(v, dtype=torch.float64).exp()) for v in values)
    label = "Perplexity of 32,768 tokens"

    def row(what: str, value: float, unit: str, op: str, bar: float | None, peer: float | None):
        return Row(
            figure=f"{label}: {what}", value=value, unit=unit, op=op, bar=bar, peer=peer,
            command=COMMAND,
        )  # fmt: skip

    return [
        row("time", statistics.median(ours), "s", "<=", None, statistics.median(theirs)),
        # No bar: three quarters of the time are matrix products at the processor's peak.
        row("speed against lm-eval", speedup, "x", ">=", None, None),
        row("value", mine, "", "<=", None, other),
        row("relative difference from lm-eval", abs(mine / other - 1), "", "<=", AGREEMENT, None),
    ]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data-root", type=Path, help="local copies of data sets (docs/data.md)")
    options.add_argument("--repeats", type=int, default=3, help="pairs of measurements")
    arguments = options.parse_args()
    if arguments.repeats < 1:
        options.error("--repeats must be at least 1")
    work = work_folder(arguments, "evaluation")
    scale = SMOKE if arguments.smoke else FULL
    material = prepare(work, scale, arguments.data_root)
    model = load_model(material.model, dtype=torch.float32)
    tokenizer, _ = load_tokenizer(material.model)
    ids = material.test_ids()
    length = scale.window
    rolling, prefix = rolling_scorer(model, tokenizer, ids.tolist(), length)
    stream = torch.cat([torch.tensor([prefix]), ids])

    def ours() -> float:
        return perplexity(model, stream, window=length + 1, stride=length).nll

    perplexity(model, stream[: length + 1], window=length + 1)  # the first forward is slower
    seconds: dict[str, list[float]] = {"ours": [], "lm-eval": []}
    values: dict[str, float] = {}
    for repeat in range(arguments.repeats):
        sides = [("ours", ours), ("lm-eval", rolling)]
        for name, function in sides if repeat % 2 == 0 else sides[::-1]:
            values[name], taken = timed(function)
            seconds[name].append(taken)
            say(f"{name}: {taken:.2f} s, {values[name]:.6f} nats a token")
    publish(
        arguments, work,
        rows_of(seconds["ours"], seconds["lm-eval"], (values["ours"], values["lm-eval"])),
    )  # fmt: skip


if __name__ == "__main__":
    entry(main)
