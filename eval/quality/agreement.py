"""How predictions agree with labels: scores of classifications and regressions, with intervals.

Examples are taken as independent of each other. The interval of an accuracy is Wilson's, of its
change between two models Agresti and Min's; those of all other scores are percentiles of 1,000
bootstrap samples of the examples (Efron & Tibshirani 1993, chapter 13), the same for the same
predictions. Of a change both models' predictions are drawn together, so that what they have in
common does not count as noise. Where every sample gives the same change, as where both models
answer alike throughout, the samples tell nothing of how seldom they differ: the interval is then
that of an accuracy's change, times what an example weighs in the score (:func:`change`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from compress.eval.quality.stats import matched_difference, share_interval

Interval = tuple[float, float]
ACCURACY, F1, MATTHEWS = "accuracy", "f1", "matthews"
SPEARMAN, PEARSON = "spearman", "pearson"
TOP5, TOP = "top5", 5
DRAWS, SEED = 1000, 0
_HELD = 1 << 20  # counts that are held at once
_TRIED = 64  # labels, and examples of a regression, whose weight in a score is looked at


def counted(
    labels: np.ndarray, predictions: np.ndarray, classes: int, times: np.ndarray
) -> np.ndarray:
    """What the scores of labels are made of: how often each label is right, given and predicted.

    Args:
        labels, predictions: numbers of labels, integers [cells].
        times: how often each cell occurs, [draws, cells].

    Returns:
        Counts [draws, 3, classes].
    """
    draws = len(times)
    offsets = classes * np.arange(draws)[:, None]

    def by(numbers: np.ndarray, weights: np.ndarray) -> np.ndarray:
        places = (offsets + numbers).ravel()
        found = np.bincount(places, weights.ravel(), minlength=draws * classes)
        return found.reshape(draws, classes)

    hits = by(labels, times * (labels == predictions))
    return np.stack([hits, by(labels, times), by(predictions, times)], axis=1)


def accuracy(counts: np.ndarray) -> np.ndarray:
    """Share of right answers. Counts are those of :func:`counted`, [..., 3, labels]; returns
    [...]."""
    hits, labels, _ = np.moveaxis(counts, -2, 0)
    return hits.sum(-1) / labels.sum(-1)


def f1(counts: np.ndarray) -> np.ndarray:
    """2 TP / (2 TP + FP + FN): of label 1 where there are two, as in GLUE; else the mean over the
    labels that occur among labels or predictions (macro F1)."""
    hits, labels, predicted = np.moveaxis(counts, -2, 0)
    occurring = labels + predicted
    each = np.divide(2 * hits, occurring, out=np.zeros(hits.shape), where=occurring > 0)
    if counts.shape[-1] == 2:
        return each[..., 1]
    return each.sum(-1) / (occurring > 0).sum(-1)


def matthews(counts: np.ndarray) -> np.ndarray:
    """Matthews' correlation, for any number of labels (Gorodkin 2004, Comput. Biol. Chem. 28:367,
    eq. 8); 0 where labels or predictions are all the same."""
    hits, labels, predicted = np.moveaxis(counts.astype(float), -2, 0)
    total = labels.sum(-1)
    scale = (total**2 - (labels**2).sum(-1)) * (total**2 - (predicted**2).sum(-1))
    shared = hits.sum(-1) * total - (labels * predicted).sum(-1)
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


_OF_COUNTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
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
    cells, times = _cells(right, said)
    whole = counted(*cells, classes, times)
    drawn = np.concatenate([counted(*cells, classes, t) for t in _drawn(times, classes)])
    found = {n: (float(of(whole)[0]), middle(of(drawn))) for n, of in _OF_COUNTS.items()}
    hits = int((right == said).sum())
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

    Of a bootstrap whose samples all give the same change the interval is Agresti and Min's of the
    examples that both models answer differently (:func:`few_examples`), times the most that another
    answer to one example changes the score.

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
        value, bounds = of(right, new) - of(right, old), middle(draws)
        if degenerate(bounds):
            unlike = int((old != new).sum())
            bounds = few_examples(value, unlike, len(right), _number_weight(of, right, old))
        return value, bounds
    of = _OF_COUNTS[name]
    (right, old, new), times = _cells(right, old, new)

    def difference(times: np.ndarray) -> np.ndarray:
        return of(counted(right, new, classes, times)) - of(counted(right, old, classes, times))

    drawn = np.concatenate([difference(t) for t in _drawn(times, classes)])
    value, bounds = float(difference(times)[0]), middle(drawn)
    if degenerate(bounds):
        unlike = int(times[0, old != new].sum())
        weight = _label_weight(of, right, old, classes, times)
        bounds = few_examples(value, unlike, int(times.sum()), weight)
    return value, bounds


def degenerate(bounds: Interval) -> bool:
    """Whether all bootstrap samples gave the same, but for rounding."""
    return bounds[1] - bounds[0] < 1e-12


def few_examples(value: float, unlike: int, count: int, weight: float) -> Interval:
    """The 95 % interval of a change that no bootstrap sample scatters.

    Args:
        value: the change.
        unlike: examples that both models answer differently.
        count: all examples.
        weight: what one example changes the score by; 0 where no answer to these examples would
            change it, so that they tell nothing of it.
    """
    if weight <= 0:
        return -1.0, 1.0
    lost = unlike if value < 0 else 0 if value > 0 else unlike // 2
    _, (low, high) = matched_difference(lost, unlike - lost, count)
    scale = weight * count
    return max(-1.0, low * scale), min(1.0, high * scale)


def _label_weight(
    of: Callable[[np.ndarray], np.ndarray],
    right: np.ndarray,
    said: np.ndarray,
    classes: int,
    times: np.ndarray,
) -> float:
    """The most that another answer to one example changes a score of labels.

    Only the rarest labels are looked at: of an F1 they weigh most.

    Args:
        right, said: labels and answers of the cells. times: how often each occurs, [1, cells].
    """
    whole = counted(right, said, classes, times)[0]
    occurs = whole[1] + whole[2]
    # Labels that never occur are all alike: one of them stands for all (the first zeros).
    order = np.argsort(occurs, kind="stable")
    answers = order[max(0, int((occurs == 0).sum()) - 1) :][:_TRIED]
    score, most = float(of(whole)), 0.0
    for cell in np.argsort(occurs[right], kind="stable")[: 4 * _TRIED]:
        label, answer = right[cell], said[cell]
        tried = np.repeat(whole[None], len(answers), axis=0)
        rows = np.arange(len(answers))
        tried[:, 0, label] -= label == answer
        tried[:, 2, answer] -= 1
        tried[rows, 0, answers] += answers == label
        tried[rows, 2, answers] += 1
        most = max(most, float(np.abs(of(tried) - score).max()))
    return most


def _number_weight(
    of: Callable[[np.ndarray, np.ndarray], float], right: np.ndarray, said: np.ndarray
) -> float:
    """The most that one answer at another end of the answers changes a correlation."""
    score, most = of(right, said), 0.0
    order = np.argsort(said, kind="stable")
    for example in np.unique(np.concatenate([order[:_TRIED], order[-_TRIED:]])):
        for answer in (said[order[0]], said[order[-1]]):
            tried = said.copy()
            tried[example] = answer
            most = max(most, abs(of(right, tried) - score))
    return most


def _cells(*answers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different examples [answers, cells], and how many there are of each, [1, cells]."""
    cells, times = np.unique(np.stack(answers).astype(int), axis=1, return_counts=True)
    return cells, times[None]


def _drawn(times: np.ndarray, classes: int) -> Iterator[np.ndarray]:
    """Bootstrap samples, some at a time: examples in one cell are alike, so that how often each
    cell is drawn is multinomial. Cells that no example is in, nearly all where labels are many, are
    in no sample either.

    Yields:
        Counts [draws, cells], :data:`DRAWS` in all.
    """
    total, generator = int(times.sum()), np.random.default_rng(SEED)
    at_once = max(1, _HELD // max(times.size, 3 * classes))
    for first in range(0, DRAWS, at_once):
        draws = min(at_once, DRAWS - first)
        yield generator.multinomial(total, times[0] / total, draws)


def _samples(count: int) -> np.ndarray:
    """Numbers of the examples of each bootstrap sample, [draws, count]."""
    return np.random.default_rng(SEED).integers(count, size=(DRAWS, count))


def middle(values: Sequence[float] | np.ndarray) -> Interval:
    """The middle 95 % of values."""
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)
