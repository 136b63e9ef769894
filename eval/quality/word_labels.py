"""How labels of words agree: entities (CoNLL's F1) where names are B-, I- and O, else the labels.

Words of one text are not independent of each other, so intervals are percentiles of 1,000 bootstrap
samples of the texts (Efron & Tibshirani 1993, chapter 13). Of a change both models' predictions are
drawn together; where every sample gives the same change, its interval is that of a share of texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from compress.eval.quality.agreement import (
    ACCURACY,
    DRAWS,
    F1,
    SEED,
    Interval,
    counted,
    degenerate,
    few_examples,
    middle,
)
from compress.eval.quality.agreement import accuracy as accuracy_of
from compress.eval.quality.agreement import f1 as f1_of

ENTITY_F1 = "entity_f1"
Span = tuple[int, int, str]  # first word, the word behind the last, type


def entities(tags: Sequence[str]) -> set[Span]:
    """The entities that tags name, as CoNLL's scorer reads them (Tjong Kim Sang & Buchholz 2000).

    ``B-x`` begins an entity of type x; ``I-x`` goes on with one of its type and else begins one.
    """
    found: set[Span] = set()
    start, kind = 0, ""
    for place, tag in enumerate([*tags, "O"]):
        position, _, named = tag.partition("-")
        inside = position == "I" and named == kind
        if kind and not inside:
            found.add((start, place, kind))
            kind = ""
        if position in ("B", "I") and not inside:
            start, kind = place, named
    return found


def tags_entities(names: Sequence[str]) -> bool:
    """Whether labels are tags of entities: O, and others that begin with B- or I-."""
    others = [name for name in names if name != "O"]
    return len(others) < len(names) and all(name[:2] in ("B-", "I-") for name in others)


def word_scores(
    lengths: Sequence[int],
    labels: Sequence[float],
    predictions: Sequence[float],
    names: Sequence[str],
) -> dict[str, tuple[float, Interval]]:
    """Scores by name, each with its 95 % interval: of entities first, where labels tag them.

    Args:
        lengths: labelled words of each text.
        labels, predictions: of the words, one text after the other.
    """
    found = {}
    for name, counts, score in _countings(names):
        table = counts(lengths, labels, predictions)
        drawn = [score(table[i].sum(0)) for i in _samples(len(lengths))]
        found[name] = (float(score(table.sum(0))), middle(drawn))
    return found


def word_change(
    name: str,
    lengths: Sequence[int],
    labels: Sequence[float],
    before: Sequence[float],
    after: Sequence[float],
    names: Sequence[str],
) -> tuple[float, Interval]:
    """A score's change from one model to another on the same texts, with its 95 % interval.

    Of a bootstrap whose samples all give the same change the interval is Agresti and Min's of the
    texts with something to count that both models answer differently, as though each were answered
    wholly right by one of them and wholly wrong by the other.
    """
    _, counts, score = next(c for c in _countings(names) if c[0] == name)
    old, new = (counts(lengths, labels, said) for said in (before, after))
    drawn = [score(new[i].sum(0)) - score(old[i].sum(0)) for i in _samples(len(lengths))]
    value, bounds = float(score(new.sum(0)) - score(old.sum(0))), middle(drawn)
    if degenerate(bounds):
        told = (old + new).reshape(len(old), -1).any(1)
        unlike = (old != new).reshape(len(old), -1).any(1)
        texts = int(told.sum())
        bounds = few_examples(value, int(unlike.sum()), texts, 1 / texts if texts else 0.0)
    return value, bounds


_Counts = Callable[[Sequence[int], Sequence[float], Sequence[float]], np.ndarray]
_Score = Callable[[np.ndarray], float]


def _countings(names: Sequence[str]) -> list[tuple[str, _Counts, _Score]]:
    """Name of a score, what it counts in each text [texts, ...], and the score of sums of it."""
    classes = len(names)

    def words(lengths: Sequence[int], labels: Sequence[float], said: Sequence[float]):
        right, told = np.asarray(labels, int), np.asarray(said, int)
        ends = np.cumsum(lengths)
        parts = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
        each = [counted(right[p], told[p], classes, np.ones((1, p.stop - p.start))) for p in parts]
        return np.concatenate(each)

    def spans(lengths: Sequence[int], labels: Sequence[float], said: Sequence[float]):
        found, start = [], 0
        for length in lengths:
            part = slice(start, start + length)
            right, told = (
                entities([names[int(x)] for x in values[part]]) for values in (labels, said)
            )
            found.append((len(right & told), len(right), len(told)))
            start += length
        return np.asarray(found)

    if tags_entities(names):
        return [(ENTITY_F1, spans, _entity_f1), (ACCURACY, words, accuracy_of)]
    return [(ACCURACY, words, accuracy_of), (F1, words, f1_of)]


def _entity_f1(counts: np.ndarray) -> float:
    """Of entities found whole and of the right type; 0 where there are none."""
    hits, right, told = counts
    return 2 * hits / (right + told) if right + told else 0.0


def _samples(count: int) -> np.ndarray:
    return np.random.default_rng(SEED).integers(count, size=(DRAWS, count))
