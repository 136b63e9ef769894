"""What is grafted from a block that goes onto its neighbours, and folded back into them."""

from __future__ import annotations

import pytest
import torch

from compress.linear.matrix import matrix
from compress.methods.depth.fuse.grafting import grafts, hold_exactly, merge_grafts
from compress.methods.depth.fuse.learning import (
    graft,
    learn_group,
)
from compress.train.options import TrainingOptions

FAMILIES = ("llama", "gpt2", "bert")
LEARN = {"steps": 30, "batch": 2, "learning_rate": 0.01, "clip": None, "precision": "float32"}


def run_group(work):
    with torch.no_grad():
        states = work.inputs.read(0)
        for block, calls in zip(work.blocks, work.calls, strict=True):
            states = calls[0](block, states)
        return states


def scatter(work):
    """Give all that learns random values."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for block in work.blocks:
            for linear in grafts(block).values():
                for parameter in (*linear.coefficients, *linear.deltas):
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    hold_exactly([linear for block in work.blocks for linear in grafts(block).values()])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_start_is_plain_removal(family, tiny, group):
    work = group(tiny(family), 1)
    before = run_group(work)
    assert len(graft(work, 4)) == sum(len(a.linears) for a in work.anatomies)
    assert torch.equal(run_group(work), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_coefficients_of_one_add_the_other_weights(family, tiny, group):
    work = group(tiny(family), 1)
    linears = [(b, n) for b, a in zip(work.blocks, work.anatomies, strict=True) for n in a.linears]
    expected = []
    for block, name in linears:
        mine, other = block.get_submodule(name), work.dropped[0].get_submodule(name)
        bias = None if mine.bias is None else mine.bias + other.bias
        expected.append((matrix(mine) + matrix(other), bias))
    graft(work, 1)
    with torch.no_grad():
        for block in work.blocks:
            for linear in grafts(block).values():
                for parameter in linear.coefficients:
                    parameter.fill_(1)
            merge_grafts(block)
    for (block, name), (weight, bias) in zip(linears, expected, strict=True):
        assert torch.equal(matrix(block.get_submodule(name)), weight)
        assert bias is None or torch.equal(block.get_submodule(name).bias, bias)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_merged_computes_what_was_learned(family, tiny, group):
    work = group(tiny(family), 1)
    plain = run_group(work)
    graft(work, 4)
    scatter(work)
    unmerged = run_group(work)
    with torch.autocast("cpu", torch.bfloat16):
        for block in work.blocks:
            for linear in grafts(block).values():
                linear.hold()
        rounded = run_group(work)
    for block in work.blocks:
        merge_grafts(block)
        assert not grafts(block)
    merged, size = run_group(work), unmerged.abs().max()
    assert (merged - unmerged).abs().max() <= 1e-5 * size
    assert (rounded - unmerged).abs().max() <= 0.05 * size
    assert (merged - plain).abs().max() > 0.01 * size


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_grafted_from_and_onto_stays_as_it_is_while_it_is_learned(family, tiny, group):
    work = group(tiny(family), 1)
    gone = {n: t.clone() for n, t in work.dropped[0].state_dict().items()}
    weights = [
        matrix(b.get_submodule(n))
        for b, a in zip(work.blocks, work.anatomies, strict=True)
        for n in a.linears
    ]
    before = [weight.clone() for weight in weights]
    norms = [p.clone() for b in work.blocks for p in b.parameters() if p.dim() == 1]
    learn_group(work, TrainingOptions(**{**LEARN, "steps": 3}), 4, 0.003, "mse")
    after = work.dropped[0].state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in gone.items())
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
    for block in work.blocks:
        merge_grafts(block)
    assert not any(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
    learned = [p for b in work.blocks for p in b.parameters() if p.dim() == 1]
    assert not all(torch.equal(a, b) for a, b in zip(learned, norms, strict=True))
