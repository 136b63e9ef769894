"""W^T = D S: a dictionary of dense atoms and sparse coefficients, found by turns.

The target is W [m, n]; its n columns are cut into B blocks of b, each with a dictionary of r atoms
in R^b, and a row of W is a sum of k atoms a block. Rows do not touch each other, whatever metric G
[n, n] the inputs are measured in: sparse coding is exact under a full G, as it would not be if the
columns of W were the sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compress.linear.algebra import cholesky
from compress.linear.atoms import Atoms, product, row_work
from compress.linear.sparse_coding import (
    CODERS,
    coding_bytes,
    coding_loss,
    coding_work,
    descended,
)

_TINY = 1e-6
_LAST = 16  # iterations of the last least squares


@dataclass(frozen=True)
class Form:
    """Blocks, atoms a block, and atoms that an output takes of each block."""

    blocks: int
    rank: int
    nonzeros: int


@dataclass
class Factors:
    """W^T = D S.

    Attributes:
        atoms: [B, r, b], of unit length.
        coefficients: S^T [m, B r], zero but for k entries a block.
        support: [m, B r], true at exactly k entries a block.
        errors: share of the energy of W that is lost, after each round.
    """

    atoms: torch.Tensor
    coefficients: torch.Tensor
    support: torch.Tensor
    errors: list[float]

    def product(self) -> torch.Tensor:
        """W as it is written, [m, n]."""
        return product(self.coefficients, self.atoms)


def factorise(
    weight: torch.Tensor,
    metric: torch.Tensor,
    form: Form,
    rounds: int,
    coding: str,
    generator: torch.Generator,
) -> Factors:
    """Sparse coding and least squares of the dictionary by turns; no round is worse than the last.

    Args:
        weight: W [m, n], float32. metric: G [n, n], positive definite; the error is that of W - W'
            in it, trace((W - W') G (W - W')^T).
        rounds: of coding; the dictionary is changed between them.
        coding: name of a coder of :mod:`compress.linear.sparse_coding`.
        generator: for the outputs that the first dictionary is made of.
    """
    metric = metric / metric.diagonal().mean()
    energy = float(((weight @ metric) * weight).sum(dtype=torch.float64))
    dictionary = first_atoms(weight, metric, form, generator)
    atoms = Atoms(dictionary, metric)
    code, kept, errors = CODERS[coding], None, []
    for number in range(rounds):
        if number:
            dictionary, kept = improved(weight, metric, dictionary, kept, form)
            atoms = atoms.changed(dictionary)
        targets = atoms.answers(weight)
        before = None if kept is None else kept / atoms.scale
        coded = code(targets, atoms, form.blocks, form.nonzeros, before)
        if before is not None:
            # Whatever the coder does: a row goes on with what suits it better.
            better = coding_loss(coded, targets, atoms) < coding_loss(before, targets, atoms)
            coded = torch.where(better[:, None], coded, before)
        if number == rounds - 1:
            coded = descended(coded, targets, atoms, support_of(coded, form), _LAST)
        kept = coded * atoms.scale
        lost = energy + float(coding_loss(coded, targets, atoms).sum(dtype=torch.float64))
        errors.append(max(lost, 0.0) / energy if energy > 0 else 0.0)
    return Factors(dictionary, kept, support_of(kept, form), errors)


def first_atoms(
    weight: torch.Tensor, metric: torch.Tensor, form: Form, generator: torch.Generator
) -> torch.Tensor:
    """Axes of the inputs, so that the product starts as a sparse W; outputs of W, drawn at random,
    for all atoms beyond as many. With fewer atoms than inputs: the leading right singular vectors
    in the metric, which for one block and k = r leave nothing to improve.
    """
    rows, columns = weight.shape
    width = columns // form.blocks
    atoms = weight.new_zeros(form.blocks, form.rank, width)
    pieces = weight.view(rows, form.blocks, width).transpose(0, 1)
    if form.rank < width:
        for block, piece in enumerate(pieces.double()):
            root = cholesky(_inner(metric, block, width), "a block of inputs")
            white = piece @ root
            leading = torch.linalg.eigh(white.t() @ white)[1][:, -form.rank :]
            atoms[block] = torch.linalg.solve_triangular(root.t(), leading, upper=True).t()
        return _unit(atoms)[0]
    atoms[:, :width] = torch.eye(width, device=weight.device, dtype=weight.dtype)
    for start in range(width, form.rank, rows):
        drawn = torch.randperm(rows, generator=generator)[: form.rank - start].to(weight.device)
        atoms[:, start : start + len(drawn)] = pieces[:, drawn]
    return _unit(atoms)[0]


def improved(
    weight: torch.Tensor, metric: torch.Tensor, atoms: torch.Tensor, coded: torch.Tensor, form: Form
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best dictionary for given coefficients, block after block, and the coefficients for its
    atoms at unit length.

    For one block, with the others as they are and R what they leave of W, the error is that of
    S_i^T D_i^T against R G_:i G_ii^-1 in the metric G_ii, whose minimum does not depend on it:
    least squares in the coefficients. Atoms that no output takes become what the worst ones lack.
    """
    rows, blocks = len(weight), form.blocks
    width = weight.shape[1] // blocks
    atoms, coded = atoms.clone(), coded.clone()
    left = weight - product(coded, atoms)
    for block in range(blocks):
        columns = slice(block * width, (block + 1) * width)
        own = coded.view(rows, blocks, -1)[:, block]
        left[:, columns] += own @ atoms[block]
        inner = _inner(metric, block, width)
        wanted = torch.linalg.solve(inner, (left @ metric[:, columns]).double().t()).t()
        wide = own.double()
        squares = wide.t() @ wide
        used = squares.diagonal() > 0
        # The ridge is towards the atoms as they are, so that no change is for the worse.
        squares.diagonal().add_(_TINY * squares.diagonal().mean() + 1e-30)
        fresh = atoms[block].double()
        fresh = fresh + torch.linalg.solve(squares, wide.t() @ (wanted - wide @ fresh))
        lacking = wanted - wide @ fresh
        unused = (~used).nonzero().flatten()
        if len(unused):
            worst = lacking.square().sum(1).topk(min(len(unused), rows)).indices
            fresh[unused[: len(worst)]] = lacking[worst]
        atoms[block] = fresh.to(atoms.dtype)
        left[:, columns] -= own @ atoms[block]
    atoms, lengths = _unit(atoms)
    return atoms, coded * lengths.flatten()


def support_of(coded: torch.Tensor, form: Form) -> torch.Tensor:
    """Exactly k entries a block of each row: those that are not zero, filled up with the first that
    are where there are fewer."""
    view = (coded != 0).view(len(coded), form.blocks, form.rank)
    order = view.to(torch.int8).argsort(dim=2, descending=True, stable=True)
    chosen = order[..., : form.nonzeros]
    return torch.zeros_like(view).scatter_(2, chosen, True).view_as(coded)


def packed(factors: Factors, form: Form) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and indices [m, B k] of the coefficients, indices ascending in a block (int64)."""
    rows = len(factors.support)
    places = factors.support.view(rows, form.blocks, form.rank)
    indices = places.nonzero()[:, 2].view(rows, form.blocks, form.nonzeros)
    values = factors.coefficients.view_as(places).gather(2, indices)
    return values.reshape(rows, -1), indices.reshape(rows, -1)


def factorise_bytes(rows: int, columns: int, form: Form, coding: str) -> int:
    """Bytes that :func:`factorise` takes beyond weight and metric."""
    count, width = form.blocks * form.rank, columns // form.blocks
    held = columns**2 + 4 * rows * count + 2 * rows * columns
    found = coding_bytes(rows, form.blocks, form.rank, width, coding)
    return found + 4 * held + 24 * rows * (width + form.rank)


def factorise_work(rows: int, columns: int, form: Form, rounds: int) -> tuple[float, float]:
    """Multiply-accumulates of :func:`factorise` with alternating directions, and the bytes that it
    writes beside products."""
    shape = form.blocks, form.rank, columns // form.blocks
    first, again = coding_work(rows, *shape, True), coding_work(rows, *shape, False)
    coded, moved = (a + (rounds - 1) * b for a, b in zip(first, again, strict=True))
    # Products with the weight, losses of two solutions and of the last, the dictionary.
    others = rows * (4.0 * row_work(*shape) + 2.0 * columns**2 + form.blocks * form.rank**2)
    return coded + rounds * others, moved


def _inner(metric: torch.Tensor, block: int, width: int) -> torch.Tensor:
    """The metric of a block of inputs, float64, with a little added to its diagonal."""
    columns = slice(block * width, (block + 1) * width)
    inner = metric[columns, columns].double()
    inner.diagonal().add_(_TINY * inner.diagonal().mean())
    return inner


def _unit(atoms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Atoms of unit length and the lengths [B, r] that they had; those of none stay."""
    lengths = atoms.norm(dim=2)
    lengths = torch.where(lengths > 0, lengths, 1.0)
    return atoms / lengths[..., None], lengths
