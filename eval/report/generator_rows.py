"""Rows of masked generators: the likelihood bound, ordered decoding, hidden tokens."""

from __future__ import annotations

from collections.abc import Iterator

from compress.eval.quality.generator import GeneratorResult
from compress.eval.quality.likelihood import LikelihoodResult
from compress.eval.report.cells import Row, error_of, number, span, times


def generator_rows(before: GeneratorResult | None, after: GeneratorResult) -> list[Row]:
    """Rows of the likelihood bound, of ordered decoding and of hidden tokens."""
    rows: list[Row] = []
    if after.likelihood:
        old = before.likelihood if before else None
        rows += _likelihood_rows("Perplexity bound", old, after.likelihood)
    for new in after.ordered:
        found = [r for r in (before.ordered if before else ()) if r.rule == new.rule]
        rows += _likelihood_rows(f"Perplexity, {new.rule} order", found[0] if found else None, new)
    olds = {r.ratio: r for r in before.recovery} if before else {}
    for new in after.recovery:
        old, name = olds.get(new.ratio), f"{new.ratio:.0%} hidden"
        rows += [
            Row(
                f"{label}, {name}",
                number(getattr(old, field)) if old else "",
                number(getattr(new, field)),
                times(getattr(new, field), getattr(old, field) if old else None),
                error_of(getattr(old, f"{field}_stderr"), old.degrees) if old else "",
                error_of(getattr(new, f"{field}_stderr"), new.degrees),
            )
            for label, field in (("Accuracy", "accuracy"), ("Nats a token", "cross_entropy"))
        ]
        if new.divergence is not None:
            rows.append(
                Row(
                    f"KL from the original, {name}", "", number(new.divergence),
                    error_after=error_of(new.divergence_stderr, new.degrees),
                )
            )  # fmt: skip
    return rows


def _likelihood_rows(
    name: str, old: LikelihoodResult | None, new: LikelihoodResult
) -> Iterator[Row]:
    yield Row(
        name,
        number(old.perplexity) if old else "",
        number(new.perplexity),
        times(new.perplexity, old.perplexity if old else None),
        span(old.perplexity_interval) if old else "",
        span(new.perplexity_interval),
    )
    if new.bits_per_byte is not None:
        first = old.bits_per_byte if old else None
        yield Row(
            f"{name}: bits per byte", number(first), number(new.bits_per_byte),
            times(new.bits_per_byte, first),
        )  # fmt: skip
