"""How a group of blocks learns to do without one of them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from compress.errors import CompressError
from compress.methods.depth.fuse.grafting import GraftedLinear, hold_exactly
from compress.models.replay import BlockCall
from compress.train.divergence import divergence
from compress.train.moment import Moment, derive_seed
from compress.train.options import TrainingOptions
from compress.train.reconstruction import BlockWork, Distance, error_of_tokens, learn_outputs

Loss = Literal["mse", "kl", "kl_code"]


def feature_divergence(output: torch.Tensor, target: torch.Tensor, call: BlockCall) -> torch.Tensor:
    """KL(teacher || student), the features of a token as logits, averaged over tokens."""
    output, target = (call.tokens(x).flatten(0, -2).float() for x in (output, target))
    return divergence(output, target, 1.0) / len(output)


def batch_divergence(output: torch.Tensor, target: torch.Tensor, call: BlockCall) -> torch.Tensor:
    """KL(teacher || student) with the sequences of a batch as outcomes, one distribution a position
    and feature; summed, over the number of sequences."""
    if call.real is not None:
        # Of all positions that are padding the distributions are uniform, and so equal.
        output, target = (x.masked_fill(~call.real[..., None], -1e9) for x in (output, target))
    output, target = (x.float().flatten(1).t() for x in (output, target))
    return divergence(output, target, 1.0) / output.shape[1]


DISTANCES: dict[Loss, Distance] = {
    "mse": error_of_tokens, "kl": feature_divergence, "kl_code": batch_divergence,
}  # fmt: skip


def graft(work: BlockWork, rank: int) -> list[GraftedLinear]:
    """Put grafted linears in the places of all linears of the blocks that stay."""
    (removed,) = work.dropped
    placed = []
    for number, (block, anatomy) in enumerate(zip(work.blocks, work.anatomies, strict=True)):
        for path in anatomy.linears:
            seed = derive_seed(work.seed, number, path)
            linear = GraftedLinear(
                block.get_submodule(path), removed.get_submodule(path), rank, seed
            )
            block.set_submodule(path, linear)
            placed.append(linear)
    return placed


def learn_group(
    work: BlockWork, options: TrainingOptions, rank: int, delta_rate: float, loss: Loss
) -> None:
    """Train what the blocks of a group take over from the one that goes, their low-rank deltas and
    their norms, until the group returns what it is to return.

    Those are kept that were best on held-out batches. Metrics: the distance there ``before``, at
    the ``end`` of learning and ``after`` all.

    Args:
        options: of the training; its learning rate is that of the coefficients.
        delta_rate: the learning rate of deltas and norms.

    Raises:
        CompressError: batches of one sequence, which kl_code finds no difference in.
    """
    if loss == "kl_code" and any(shape[0] < 2 for shape in work.inputs.shapes):
        raise CompressError(
            "calibration batches of several sequences, which kl_code compares", "batches of one",
            "Set calibration.batch to 8, as the released code has it, or loss: kl",
        )  # fmt: skip
    norms = _norms(work)
    linears = graft(work, rank)
    for parameter in norms:
        parameter.requires_grad_(True)
    deltas = [parameter for linear in linears for parameter in linear.deltas]
    parameters = [
        {"params": [parameter for linear in linears for parameter in linear.coefficients]},
        {"params": [*deltas, *norms], "lr": delta_rate},
    ]

    def prepare(_moment: Moment) -> float:
        for linear in linears:
            linear.hold()
        return 0.0

    best = learn_outputs(
        work, parameters, options, prepare=prepare, settle=lambda: hold_exactly(linears),
        distance=DISTANCES[loss],
    )  # fmt: skip
    work.metrics |= best.metrics("fuse")


def _norms(work: BlockWork) -> list[nn.Parameter]:
    """Scales and shifts of the norms in the blocks."""
    found = []
    for block, anatomy in zip(work.blocks, work.anatomies, strict=True):
        inside = tuple(f"{path}." for path in anatomy.linears)
        found += [
            parameter
            for name, parameter in block.named_parameters()
            if parameter.dim() == 1 and not name.startswith(inside)
        ]
    return found
