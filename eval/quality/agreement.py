"""How predictions agree with labels: scores of classifications and regressions, with intervals.

Examples are taken as independent of each other. The interval of an accuracy is Wilson's, of its
change between two models Agresti and Min's; those of all other scores are percentiles of 1,000
bootstrap samples of the examples (Efron & Tibshirani 1993, chapter 13), the same for the same
predictions. Of a change both models' predictions are drawn together, so that what they have in
common does not count as noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from compress.eval.quality.stats import matched_difference, share_interval

Interval = tuple[float, float]
ACCURACY, F1, MATTHEWS = "accuracy", "f1", "matthews"
SPEARMAN, PEARSON = "spearman", "pearson"
TOP5, TOP = "top5", 5
DRAWS, SEED = 1000, 0


def accuracy(table: np.ndarray) -> np.ndarray:
    """Share of right answers. Tables are counts [..., label, prediction]; returns [...]."""
    return np.trace(table, axis1=-2, axis2=-1) / table.sum((-2, -1))


def f1(table: np.ndarray) -> np.ndarray:
    """2 TP / (2 TP + FP + FN): of label 1 where there are two, as in GLUE; else the mean over the
    labels that occur among labels or predictions (macro F1)."""
    hits = np.diagonal(table, axis1=-2, axis2=-1)
    occurring = table.sum(-1) + table.sum(-2)
    each = np.divide(2 * hits, occurring, out=np.zeros(hits.shape), where=occurring > 0)
    if table.shape[-1] == 2:
        return each[..., 1]
    return each.sum(-1) / (occurring > 0).sum(-1)


def matthews(table: np.ndarray) -> np.ndarray:
    """Matthews' correlation, for any number of labels (Gorodkin 2004, Comput. Biol. Chem. 28:367,
    eq. 8); 0 where labels or predictions are all the same."""
    total = table.sum((-2, -1)).astype(float)
    labels, predicted = table.sum(-1).astype(float), table.sum(-2).astype(float)
    hits = np.trace(table, axis1=-2, axis2=-1)
    scale = (total**2 - (labels**2).sum(-1)) * (total**2 - (predicted**2).sum(-1))
    shared = hits * total - (labels * predicted).sum(-1)
    return np.divide(shared, np.sqrt(scale), out=np.zeros(total.shape), where=scale > 0)


def pearson(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Correlation of numbers [n]; 0 where one side is constant."""
    a, b = labels - labels.mean(), predictions - predictions.mean()
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 0 else 0.0


def spearman(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Correlation of ranks, equal numbers sharing the mean of theirs."""
    return pearson(_ranks(labels), _ranks(predictions))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[places]


_OF_TABLES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    ACCURACY: accuracy, F1: f1, MATTHEWS: matthews,
}  # fmt: skip
_OF_NUMBERS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    SPEARMAN: spearman, PEARSON: pearson,
}  # fmt: skip


def scores(
    labels: Sequence[float], predictions: Sequence[float], classes: int
) -> dict[str, tuple[float, Interval]]:
    """Scores by name, each with its 95 % interval.

    Args:
        labels, predictions: of the examples, in one order.
        classes: number of labels; 0 where numbers are predicted.
    """
    right, said = np.asarray(labels, float), np.asarray(predictions, float)
    if not classes:
        draws = [(right[i], said[i]) for i in _samples(len(right))]
        return {
            name: (of(right, said), middle([of(*draw) for draw in draws]))
            for name, of in _OF_NUMBERS.items()
        }
    cells = (right * classes + said).astype(int)
    table = np.bincount(cells, minlength=classes**2).reshape(classes, classes)
    drawn = _drawn(table)
    found = {n: (float(of(table)), middle(of(drawn))) for n, of in _OF_TABLES.items()}
    hits = int(np.trace(table))
    return {**found, ACCURACY: (found[ACCURACY][0], share_interval(hits, len(right)))}


def image_scores(
    labels: Sequence[float], predictions: Sequence[float], among: Sequence[bool] | None
) -> dict[str, tuple[float, Interval]]:
    """Accuracy and the share of labels among the five likeliest, each with its 95 % interval
    (Wilson's). Other scores are not usual of images, whose labels may be thousands.

    Args:
        among: whether each label was among the five; None where there are no more than five.
    """
    hits = {ACCURACY: [said == right for said, right in zip(predictions, labels, strict=True)]}
    if among is not None:
        hits[TOP5] = list(among)
    return {n: (sum(h) / len(h), share_interval(sum(h), len(h))) for n, h in hits.items()}


def change_of_hits(before: Sequence[bool], after: Sequence[bool]) -> tuple[float, Interval]:
    """The change of a share from one model to another on the same examples, with its 95 % interval.

    Args:
        before, after: of each example, whether it counts.
    """
    old, new = np.asarray(before, bool), np.asarray(after, bool)
    return matched_difference(int((old & ~new).sum()), int((new & ~old).sum()), len(old))


def change(
    name: str,
    labels: Sequence[float],
    before: Sequence[float],
    after: Sequence[float],
    classes: int,
) -> tuple[float, Interval]:
    """A score's change from one model to another on the same examples, with its 95 % interval.

    Args:
        name: of the score.
        before, after: predictions.
    """
    right, old, new = (np.asarray(x, float) for x in (labels, before, after))
    if name == ACCURACY:
        return change_of_hits(old == right, new == right)
    if not classes:
        of = _OF_NUMBERS[name]
        draws = [of(right[i], new[i]) - of(right[i], old[i]) for i in _samples(len(right))]
        return of(right, new) - of(right, old), middle(draws)
    cells = ((right * classes + old) * classes + new).astype(int)
    table = np.bincount(cells, minlength=classes**3).reshape(classes, classes, classes)
    of = _OF_TABLES[name]

    def difference(counts: np.ndarray) -> np.ndarray:
        return of(counts.sum(-2)) - of(counts.sum(-1))

    return float(difference(table)), middle(difference(_drawn(table)))


def _drawn(table: np.ndarray) -> np.ndarray:
    """Bootstrap samples of a table of counts: examples in one cell are alike, so the counts of a
    sample are multinomial. [draws, ...]"""
    total = int(table.sum())
    flat = np.random.default_rng(SEED).multinomial(total, table.ravel() / total, DRAWS)
    return flat.reshape(DRAWS, *table.shape)


def _samples(count: int) -> np.ndarray:
    """Numbers of the examples of each bootstrap sample, [draws, count]."""
    return np.random.default_rng(SEED).integers(count, size=(DRAWS, count))


def middle(values: Sequence[float] | np.ndarray) -> Interval:
    """The middle 95 % of values."""
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)
