"""Sparse coding, dictionaries, and the forms that take a given number of bytes."""

from __future__ import annotations

import pytest
import torch

from compress.linear.algebra import principal_outputs
from compress.linear.atoms import Atoms
from compress.linear.dense_sparse import stored_bytes
from compress.linear.dictionary import Form, factorise, packed
from compress.linear.sparse_coding import CODERS, coding_loss
from compress.methods.factorize.forms import form_for
from compress.methods.factorize.sensitivity import LEVELS, losses, shared_out


@pytest.fixture(scope="module")
def problem():
    """A weight [48, 32] and a metric in which its inputs hang together."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(32, 32, generator=generator)
    inputs = torch.randn(200, 32, generator=generator) @ mix
    return torch.randn(48, 32, generator=generator), inputs.t() @ inputs


def solved(problem, form, rounds=4, coding="directions"):
    return factorise(*problem, form, rounds, coding, torch.Generator().manual_seed(0))


def lost(problem, product):
    weight, metric = problem
    wrong = weight - product
    return float(((wrong @ metric) * wrong).sum() / ((weight @ metric) * weight).sum())


@pytest.mark.parametrize("coding", CODERS)
def test_every_output_is_made_of_k_different_atoms_a_block(problem, coding):
    form = Form(blocks=2, rank=20, nonzeros=5)
    _, indices = packed(solved(problem, form, 2, coding), form)
    blocks = indices.view(48, 2, 5)
    assert bool((blocks.diff(dim=2) > 0).all())  # ascending, so none twice
    assert int(blocks.min()) >= 0 and int(blocks.max()) < 20


def test_a_column_of_zeros_has_as_many_entries_as_any(problem):
    weight, metric = problem[0].clone(), problem[1]
    weight[3] = 0
    form = Form(2, 20, 5)
    values, indices = packed(solved((weight, metric), form, 2), form)
    assert indices.shape == (48, 10) and not values[3].any()


@pytest.mark.parametrize("coding", CODERS)
def test_no_round_is_worse_and_the_error_is_what_is_said(problem, coding):
    found = solved(problem, Form(2, 24, 6), 5, coding)
    assert all(b <= a * (1 + 1e-4) for a, b in zip(found.errors, found.errors[1:], strict=False))
    assert found.errors[-1] == pytest.approx(lost(problem, found.product()), rel=1e-3)


def test_all_atoms_of_one_block_are_the_truncated_svd(problem):
    weight, metric = problem
    found = solved(problem, Form(1, 12, 12), 1)
    assert found.errors[-1] == pytest.approx(
        principal_outputs(weight, 12, gram=metric)[1], rel=1e-3
    )


def test_the_error_falls_with_atoms_and_with_nonzeros(problem):
    def error(rank, nonzeros):
        return solved(problem, Form(2, rank, nonzeros)).errors[-1]

    assert error(24, 3) > error(24, 6) > error(24, 12)
    assert error(12, 6) > error(24, 6) > error(40, 6)


def test_one_atom_an_output_is_as_good_as_clusters_of_directions(problem):
    """k = 1, one block: gain-shape quantisation, in which each output goes with its best atom."""
    weight, metric = problem
    found = solved(problem, Form(1, 8, 1), 6)
    atoms = found.atoms[0]
    along = (weight @ metric @ atoms.t()).square() / ((atoms @ metric) * atoms).sum(1)
    best = along.amax(1).sum() / ((weight @ metric) * weight).sum()
    assert found.errors[-1] == pytest.approx(1 - float(best), rel=0.05)


def test_coders_in_the_order_of_their_price(problem):
    """Pursuit looks at what is left, correlation does not; directions take atoms back."""
    generator = torch.Generator().manual_seed(0)
    atoms = Atoms(torch.randn(2, 20, 12, generator=generator), problem[1][:24, :24])
    targets = atoms.answers(torch.randn(64, 24, generator=generator))
    loss = {
        name: float(coding_loss(code(targets, atoms, 2, 6, None), targets, atoms).sum())
        for name, code in CODERS.items()
    }
    assert loss["directions"] < loss["pursuit"] < loss["correlation"]


@pytest.mark.parametrize(("blocks", "rank", "width"), [(4, 17, 8), (2, 5, 16), (1, 40, 8)])
def test_products_with_atoms_are_those_with_their_matrix(blocks, rank, width):
    """Of unit energy, and the same whether the matrix of products is formed or not."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(90, blocks * width, generator=generator)
    metric = inputs.t() @ inputs / 90
    dictionary = torch.randn(blocks, rank, width, generator=generator)
    atoms = Atoms(dictionary, metric)
    flat = torch.block_diag(*(dictionary * atoms.scale.view(blocks, rank, 1)))
    gram = flat @ metric @ flat.t()
    x = torch.randn(7, blocks * rank, generator=generator)
    rows = torch.randn(7, blocks * width, generator=generator)
    torch.testing.assert_close(gram.diagonal(), torch.ones(blocks * rank))
    torch.testing.assert_close(atoms.matrix(), gram, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(atoms.times(x), x @ gram, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(atoms.answers(rows), rows @ metric @ flat.t(), rtol=1e-4, atol=1e-4)
    for shift in (0.03, 1.0):
        wanted = torch.linalg.solve((gram + shift * torch.eye(len(gram))).double(), x.double().t())
        found = atoms.shifted_inverse(shift)(x)
        torch.testing.assert_close(found, wanted.t().float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(576, 576), (192, 576), (1536, 576), (576, 1536), (64, 48)])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
def test_a_form_takes_the_bytes_that_it_is_given(shape, ratio):
    for value_bytes in (2, 4):
        form = form_for(*shape, ratio, value_bytes, 2.0)
        budget = ratio * shape[0] * shape[1] * value_bytes
        size = stored_bytes(*shape, form.blocks, form.rank, form.nonzeros, value_bytes)
        one_more = shape[1] * value_bytes  # a full dictionary, or less than one atom more
        assert size <= budget and (form.rank == 256 or budget - size < one_more)
        assert shape[1] % form.blocks == 0 and form.nonzeros <= form.rank


def test_shares_go_where_they_save_most():
    generator = torch.Generator().manual_seed(0)
    flat, steep = torch.ones(20, 20), torch.randn(20, 20, generator=generator) ** 5
    curves = {"flat": losses(flat, torch.ones(20)), "steep": losses(steep, torch.ones(20))}
    shares = shared_out(curves, {"flat": 400, "steep": 400}, 0.5)
    assert shares["flat"] > shares["steep"] >= LEVELS[0]
    assert sum(shares.values()) == pytest.approx(1.0, abs=0.051)
