"""What a narrowed block keeps, and what the closed forms make up for."""

from __future__ import annotations

import pytest
import torch

import compress
from compress.engine.context import StepContext
from compress.engine.steps import run_step
from compress.linear.algebra import relative_error
from compress.linear.statistics import GRAM, InputStatistics
from compress.methods.depth.flatten.method import Flatten
from compress.methods.depth.flatten.restoring import (
    corrected,
    head_scores,
    leverage_scores,
    ridge,
)
from compress.models.anatomy import anatomy_of, find_blocks
from compress.models.stream import StreamedModel

PAIR = [[0], [1, 2]]
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@pytest.fixture
def gram():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    return x, x.T @ x


def test_scores_are_those_of_the_definition(make, gram):
    x, g = gram
    penalty = ridge(g, 0.5)
    assert penalty == pytest.approx(0.5 * float(torch.linalg.svdvals(g).mean()), rel=1e-4)
    expected = torch.diagonal(g.double() @ torch.linalg.inv(g.double() + penalty * torch.eye(12)))
    assert torch.allclose(leverage_scores(g, penalty, "it"), expected, atol=1e-6)
    anatomy = anatomy_of(make("llama")).blocks[0]
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(50, 32, generator=generator)
    weight = torch.randn(32, 32, generator=generator)
    statistics = InputStatistics(32, GRAM)
    statistics.update(inputs)
    scores = head_scores(weight, statistics, anatomy)
    for group in range(2):
        by_hand = 0.0
        for head in (2 * group, 2 * group + 1):
            columns = slice(8 * head, 8 * head + 8)
            weighted = inputs[:, columns] * weight[:, columns].norm(dim=0)
            by_hand += float(weighted.square().sum(1).mean().sqrt())
        assert float(scores[group]) == pytest.approx(by_hand, rel=1e-4)


def test_the_correction_is_the_minimum(gram):
    x, g = gram
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(6, 12, generator=generator)
    every, kept = torch.arange(12), torch.tensor([0, 2, 3, 7, 8, 11])
    assert torch.equal(corrected(weight, g, every, 1.0, "it"), weight)
    plain = relative_error(weight, weight[:, kept], g, kept)
    assert relative_error(weight, corrected(weight, g, kept, 1e-6, "it"), g, kept) < 0.9 * plain
    for penalty in (0.1, 10.0, 1000.0):

        def objective(narrow, penalty=penalty):
            lost = (x @ weight.T - x[:, kept] @ narrow.T).square().sum()
            return float(lost + penalty * (narrow - weight[:, kept]).square().sum())

        found = corrected(weight, g, kept, penalty, "it")
        least = objective(found)
        assert least <= objective(weight[:, kept])
        for _ in range(5):
            shifted = found + 0.01 * torch.randn(found.shape, generator=generator)
            assert objective(shifted) > least


def test_neurons_that_others_repeat_cost_nothing():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(100, 6, generator=generator).double()
    x = torch.cat([x, x.flip(1)], 1)  # each twice
    weight, kept = torch.randn(4, 12, generator=generator).double(), torch.arange(6)
    errors = []
    for multiple in (1.0, 1e-2, 1e-4):
        narrow = corrected(weight, x.T @ x, kept, ridge(x.T @ x, multiple), "it")
        errors.append(relative_error(weight, narrow, x.T @ x, kept))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-6


def test_the_grid_takes_the_ridge_of_the_least_error(make, tokens, tmp_path):
    def error(**options):
        notes = []
        context = StepContext(
            StreamedModel(make("llama")), [{"input_ids": tokens}], tmp_path,
            report=lambda stage, index, count, note: notes.append(note),
        )  # fmt: skip
        run_step(Flatten(remove=1, **options), context)
        (found,) = [n for n in notes if isinstance(n, dict) and "down.error" in n]
        assert found["down.error"] <= found["down.error_uncorrected"] + 1e-6
        assert found["attention_out.error"] <= found["attention_out.error_uncorrected"] + 1e-6
        return found["down.error"], found["down.ridge"]

    least, chosen = error()
    single = {r: error(ridge=r)[0] for r in (0.001, 0.1, 10.0)}
    assert least <= min(single.values())
    assert error(ridge=chosen)[0] == pytest.approx(least)


@pytest.mark.parametrize(
    ("family", "compute", "restored"),
    [
        ("llama", torch.float32, True), ("llama", torch.bfloat16, True),
        ("gpt2", torch.float32, True), ("llama", torch.float32, False),
    ],
)  # fmt: skip
def test_the_refit_brings_held_out_text_nearer_to_the_model_as_it_was(
    family, compute, restored, make, tmp_path
):
    ids = torch.randint(5, 200, (60, 16), generator=torch.Generator().manual_seed(3))
    batches = [{"input_ids": part} for part in ids.split(3)]
    held = batches[-1]["input_ids"]  # a twentieth

    class Last(Flatten):
        def decide(self, similarity, anatomy):
            return {"groups": PAIR, "similarity": similarity}

    def returned(model):
        seen = []
        hook = find_blocks(model)[1][-1].register_forward_hook(lambda _m, _a, out: seen.append(out))
        with torch.no_grad():
            model(held)
        hook.remove()
        return seen[0][0] if isinstance(seen[0], tuple) else seen[0]

    def lost(**options):
        model = make(family)
        target = returned(model)
        compress.apply(
            model,
            [Last(remove=1, restore_width=restored, **options)],
            batches,
            compute=NAMES[compute],
        )
        error = (returned(model) - target).square().sum(-1) / target.square().sum(-1)
        return float(error.sum())

    notes = []
    context = StepContext(
        StreamedModel(make(family)), batches, tmp_path, compute=compute,
        report=lambda stage, index, count, note: notes.append(note),
    )  # fmt: skip
    run_step(Last(remove=1, restore_width=restored), context)
    (note,) = [note for note in notes if isinstance(note, dict) and "refit" in note]
    assert note["refit"] < 1
    tolerance = 1e-3 if compute == torch.float32 else 0.1
    assert lost() / lost(refit=False) == pytest.approx(note["refit"], rel=tolerance)
