"""Figures of a report by name: what a recipe can expect of its run (light: imports nothing)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compress.eval.report.schema import Report
    from compress.eval.spec import EvaluationResult

ORIGINAL = "original."  # in front of a name: of the model before its steps
TASKS = "tasks."  # tasks.NAME.METRIC, as in tasks.lambada_openai.acc

_Of = Callable[["EvaluationResult"], "float | None"]


def _samples(field: str) -> _Of:
    """Of the samples made in the most steps."""

    def of(result: EvaluationResult) -> float | None:
        made = result.generator and result.generator.generation
        images = made and made.points and max(made.points, key=lambda p: p.steps).images
        return getattr(images, field) if images else None

    return of


def _score(name: str) -> _Of:
    """Of a head of labels."""

    def of(result: EvaluationResult) -> float | None:
        found = result.labels and result.labels.scores.get(name)
        return found.value if found else None

    return of


FIGURES: dict[str, _Of] = {
    "perplexity": lambda r: r.perplexity and r.perplexity.perplexity,
    "bits_per_byte": lambda r: r.perplexity and r.perplexity.bits_per_byte,
    "masked_accuracy": lambda r: r.masked and r.masked.accuracy,
    "masked_cross_entropy": lambda r: r.masked and r.masked.cross_entropy,
    "pseudo_perplexity": lambda r: r.masked and r.masked.pseudo_perplexity,
    "perplexity_bound": lambda r: (
        r.generator and r.generator.likelihood and r.generator.likelihood.perplexity
    ),
    "accuracy": _score("accuracy"),
    "f1": _score("f1"),
    "matthews": _score("matthews"),
    "entity_f1": _score("entity_f1"),
    "spearman": _score("spearman"),
    "pearson": _score("pearson"),
    "sample_accuracy": _samples("accuracy"),
    "sample_frechet": _samples("frechet"),
    "parameters": lambda r: r.cost.size.parameters,
    "nonzero_parameters": lambda r: r.cost.size.nonzero_parameters,
    "checkpoint_bytes": lambda r: r.cost.size.checkpoint_bytes,
    "bits_per_weight": lambda r: r.cost.size.bits_per_weight,
    "macs_per_token": lambda r: r.cost.macs.per_token,
    "prefill_speed": lambda r: r.latency and r.latency.prefill.speedup,
    "decode_speed": lambda r: r.latency and r.latency.decode and r.latency.decode.speedup,
}


def unknown(name: str, tasks: Iterable[str]) -> str | None:
    """The part of a figure's name that no report has, or None where the name is a good one.

    Args:
        name: as in FIGURES, or tasks.NAME.METRIC, either with ``original.`` in front.
        tasks: that the evaluation will run.
    """
    plain = name.removeprefix(ORIGINAL)
    if not plain.startswith(TASKS):
        return None if plain in FIGURES else name
    task, dot, metric = plain.removeprefix(TASKS).rpartition(".")
    return None if dot and metric and task in tasks else name


def known(tasks: Iterable[str]) -> list[str]:
    """All names, for a hint; a task's with its usual metric."""
    plain = [*FIGURES, *(f"{TASKS}{task}.acc" for task in tasks)]
    return plain + [ORIGINAL + name for name in plain]


def figure_of(report: Report, name: str) -> float | None:
    """The figure of that name, None where the report does not have it."""
    plain = name.removeprefix(ORIGINAL)
    result = report.after if plain == name else report.before
    if result is None:
        return None
    if not plain.startswith(TASKS):
        return FIGURES[plain](result) if plain in FIGURES else None
    task, _, metric = plain.removeprefix(TASKS).rpartition(".")
    found = result.tasks.tasks.get(task) if result.tasks else None
    score = found.metrics.get(metric) if found else None
    return score.value if score else None
