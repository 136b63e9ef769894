"""Scores equal what their definitions give, one example after the other."""

from __future__ import annotations

import math
import random
import tracemalloc

import pytest
import torch

from compress.eval.quality import agreement
from compress.eval.quality.labels import LabelsResult, label_scores
from compress.eval.quality.stats import matched_difference, share_interval
from compress.eval.report.label_rows import label_note
from compress.eval.report.verdicts import Loss, label_loss
from compress.eval.spec import ToleranceSpec
from compress.models.inputs import Rows


def drawn(classes: int, count: int = 200, seed: int = 0) -> tuple[list[int], list[int]]:
    generator = random.Random(seed)
    labels = [generator.randrange(classes) for _ in range(count)]
    said = [y if generator.random() < 0.7 else generator.randrange(classes) for y in labels]
    return labels, said


def covariance(a: list[int], b: list[int], classes: int) -> float:
    """Of indicators, summed over the labels: what Matthews' correlation is made of."""
    n = len(a)
    total = 0.0
    for k in range(classes):
        x, y = [float(v == k) for v in a], [float(v == k) for v in b]
        mean_x, mean_y = sum(x) / n, sum(y) / n
        total += sum((p - mean_x) * (q - mean_y) for p, q in zip(x, y, strict=True))
    return total


@pytest.mark.parametrize("classes", [2, 4])
def test_scores_of_labels(classes):
    labels, said = drawn(classes)
    found = agreement.scores(labels, said, classes)
    pairs = list(zip(labels, said, strict=True))
    assert found["accuracy"][0] == pytest.approx(sum(y == p for y, p in pairs) / len(pairs))
    each = []
    for k in range(classes):
        hits = sum(y == p == k for y, p in pairs)
        precision = hits / sum(p == k for p in said)
        recall = hits / sum(y == k for y in labels)
        each.append(2 * precision * recall / (precision + recall))
    wanted = each[1] if classes == 2 else sum(each) / classes
    assert found["f1"][0] == pytest.approx(wanted)
    scale = covariance(labels, labels, classes) * covariance(said, said, classes)
    wanted = covariance(labels, said, classes) / math.sqrt(scale)
    assert found["matthews"][0] == pytest.approx(wanted)
    for value, (low, high) in found.values():
        assert low < value < high


def test_one_answer_for_all_has_no_correlation_and_f1_leaves_out_what_never_occurs():
    found = agreement.scores([0, 1, 0, 1], [1, 1, 1, 1], 2)
    assert found["matthews"][0] == 0 and found["f1"][0] == pytest.approx(2 / 3)
    assert agreement.scores([0, 1, 0, 1], [0, 1, 0, 1], 3)["f1"][0] == 1


def test_correlations_of_numbers_with_ties():
    labels, said = [1.0, 2.0, 2.0, 4.0, 5.0], [0.1, 0.3, 0.2, 0.3, 0.2]
    found = agreement.scores(labels, said, 0)

    def correlation(a, b):
        x, y = (torch.tensor(v, dtype=torch.float64) for v in (a, b))
        return float(torch.corrcoef(torch.stack([x, y]))[0, 1])

    assert found["pearson"][0] == pytest.approx(correlation(labels, said))
    ranks = correlation([1, 2.5, 2.5, 4, 5], [1, 4.5, 2.5, 4.5, 2.5])
    assert found["spearman"][0] == pytest.approx(ranks)


def test_intervals_of_shares():
    # Wilson's of 9 of 10, and of all of 10, from the roots of (p - x)^2 = z^2 x (1 - x) / n.
    for hits in (9, 10):
        low, high = share_interval(hits, 10)
        for x in (low, high):
            assert (hits / 10 - x) ** 2 == pytest.approx(1.959964**2 * x * (1 - x) / 10, abs=1e-12)
    value, (low, high) = matched_difference(10, 4, 100)
    assert value == pytest.approx(-0.06)
    half = 1.959964 * math.sqrt(10.5 + 4.5 - 6**2 / 102) / 102
    assert (low, high) == pytest.approx((-6 / 102 - half, -6 / 102 + half))
    assert matched_difference(0, 0, 50)[1][0] < 0 < matched_difference(0, 0, 50)[1][1]


def test_changes_are_paired_by_example():
    labels, before = drawn(2, 400)
    after = [1 - p if i % 40 == 0 else p for i, p in enumerate(before)]
    for name in ("accuracy", "f1", "matthews"):
        old, new = (agreement.scores(labels, x, 2)[name] for x in (before, after))
        value, (low, high) = agreement.change(name, labels, before, after, 2)
        assert value == pytest.approx(new[0] - old[0]) and low < high
        assert high - low < 0.6 * (old[1][1] - old[1][0])
    numbers = [float(y) + 0.1 * p for y, p in zip(labels, before, strict=True)]
    value, bounds = agreement.change("pearson", labels, numbers, numbers, 0)
    assert value == 0 and -0.05 < bounds[0] < 0 < bounds[1] < 0.05


@pytest.mark.parametrize("name", ["f1", "matthews", "pearson"])
def test_alike_answers_to_few_examples_do_not_make_sure(name):
    classes = 0 if name == "pearson" else 2
    for count, verdict in ((8, "uncertain"), (2000, "within")):
        labels = [i % 2 for i in range(count)]
        said = [1 - y if i % 4 == 0 else y for i, y in enumerate(labels)]
        value, (low, high) = agreement.change(name, labels, said, said, classes)
        assert value == 0 and low < 0 < high
        assert Loss(0.0, (-high, -low), 0.01).verdict == verdict
    # An F1 of a label that never occurs is not known to stay; nor is a change of one example.
    assert agreement.change("f1", [0] * 99, [0] * 99, [0] * 99, 2)[1] == (-1, 1)
    value, (low, high) = agreement.change("f1", [1], [1], [0], 2)
    assert value == -1 and low < 0 < high
    # A rare label weighs more than a frequent one.
    rare = [int(i < 10) for i in range(2000)]
    assert agreement.change("f1", rare, rare, rare, 2)[1][1] > 0.05


def test_many_labels_take_little_memory():
    labels, before = drawn(100, 300)
    _, after = drawn(100, 300, seed=1)
    tracemalloc.start()
    try:
        assert agreement.scores(labels, before, 100)["f1"][0] > 0.5
        for name in ("f1", "matthews"):
            value, (low, high) = agreement.change(name, labels, before, after, 100)
            assert low < value < high < 0
        assert tracemalloc.get_traced_memory()[1] < 50e6  # a table of all triples: 8 GB
    finally:
        tracemalloc.stop()


def test_a_model_is_scored_whatever_the_batches(classifier):
    model = classifier()
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 20, (24,), generator=generator).tolist()
    ids = [torch.randint(7, 263, (n,), generator=generator) for n in lengths]
    rows = Rows({"input_ids": ids}, torch.arange(24) % 2)
    found = label_scores(model, rows, batch_size=5)
    with torch.no_grad():
        logits = torch.cat([model(input_ids=row[None]).logits for row in ids])
    assert found.predictions == logits.argmax(-1).tolist() and found.names == ("bad", "good")
    loss = torch.nn.functional.cross_entropy(logits, rows.labels)
    assert found.loss == pytest.approx(float(loss), rel=1e-5)
    assert LabelsResult.model_validate_json(found.model_dump_json()) == found


def result(labels: list[int], said: list[int]) -> LabelsResult:
    found = agreement.scores(labels, said, 2)
    return LabelsResult(
        task="sequence", names=("a", "b"), examples=len(labels), loss=1.0, labels=labels,
        predictions=said,
        scores={n: {"value": v, "interval": bounds} for n, (v, bounds) in found.items()},
    )  # fmt: skip


def test_verdicts_hold_the_change_against_the_tolerance():
    labels = [i % 2 for i in range(2000)]
    wrong = {k: [1 - y if i < k else y for i, y in enumerate(labels)] for k in (100, 104, 180)}
    original, spec = result(labels, wrong[100]), ToleranceSpec()
    for errors, verdict in ((104, "within"), (180, "outside")):
        assert (
            label_loss("accuracy", original, result(labels, wrong[errors]), spec).verdict == verdict
        )
    better = label_loss("accuracy", result(labels, wrong[180]), original, spec)
    assert better.verdict == "better" and better.value == pytest.approx(-0.04)
    others = result(labels[:1000], wrong[100][:1000])
    assert label_loss("accuracy", original, others, spec).verdict == "uncertain"


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({}, "are Wilson's for the accuracy, bootstrap over examples for the others."),
        ({"task": "token", "lengths": [2, 2]}, "are of a bootstrap over texts."),
        ({"task": "image"}, "are Wilson's."),
        ({"names": ()}, "are of a bootstrap over examples."),
    ],
)
def test_the_report_says_whose_intervals_it_has(told, words):
    found = result([0, 1, 0, 1], [1, 1, 0, 1]).model_copy(update=told)
    assert f"4 labelled examples; intervals (95 %) {words} Changes" in label_note(found)


def test_examples_in_memory_are_scored_as_those_of_a_file(classifier, pairing, reviews, columns):
    import json

    import compress

    path = reviews(20)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    given = [{"text": row["review"], "label": row["mood"]} for row in rows]
    model, cheap = classifier(), {"memory": False}
    read = {"examples": {"source": str(path), **columns}, **cheap}
    one = compress.evaluate(model, read, tokenizer=pairing)
    other = compress.evaluate(model, cheap, examples=given, tokenizer=pairing)
    assert one.after.labels == other.after.labels and other.data[0].name.endswith("in memory")
    with pytest.raises(compress.CompressError, match="one text, or examples"):
        compress.evaluate(model, read, examples=given, tokenizer=pairing)
