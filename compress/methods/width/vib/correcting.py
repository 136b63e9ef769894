"""Fitting what stays, in closed form, to what the whole model computed.

A linear of the gated model reads what is left of its input, made by linears that have lost units
themselves. Its weight is fitted by least squares to the outputs that it had in the whole model, on
the inputs that it has now, site after site and block after block, so that each makes up for the
loss of those before it (Frantar et al. 2023 call that order true sequential).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from compress.linear.algebra import cholesky
from compress.linear.matrix import matrix
from compress.methods.base import HEADS, HIDDEN, NEURONS
from compress.methods.width.vib.gates import ATTENTION, FFN, Gates
from compress.models.anatomy import ATTENTION_OUT, DOWN, QKV, UP, Anatomy, BlockAnatomy, Site
from compress.models.calls import capture_inputs
from compress.models.replay import BlockCall
from compress.models.units import unit_columns
from compress.train.teacher import model_inputs

# Kind of a site -> gates of the units there, and of the sub-layer that it is in.
_SUBLAYERS = {
    QKV: (HEADS, ATTENTION), ATTENTION_OUT: (HEADS, ATTENTION),
    UP: (NEURONS, FFN), DOWN: (NEURONS, FFN),
}  # fmt: skip
_LEAST_MEAN = 1e-6  # nothing can be fitted through a gate below that


class _Reached(Exception):
    """Ends a block's forward once it has come to the site that was asked for."""


@dataclass
class _States:
    """Hidden states in memory, a batch an entry; takes what ``capture_inputs`` would write."""

    batches: list[torch.Tensor] = field(default_factory=list)

    def write(self, _index: int, hidden: torch.Tensor) -> None:
        self.batches.append(hidden)


@torch.no_grad()
def correct(
    model: nn.Module,
    anatomy: Anatomy,
    gates: Gates,
    batches: list[dict[str, torch.Tensor]],
    damping: float,
    *,
    learned: bool = False,
) -> None:
    """Fit the linears of all blocks to what they return with all units in place.

    Args:
        model: with its gates placed; what is kept is decided.
        batches: whose tokens, padding left out, the fits are on.
        damping: ridge towards the weights as they are, as a share of the mean input energy.
        learned: weights have learned beside the gates. They are right with gates at their means
            then, else with open gates.
    """
    device = next(model.parameters()).device
    inputs = [{n: t.to(device) for n, t in model_inputs(batch).items()} for batch in batches]
    whole, left = _States(), _States()
    decided = {kind: gate.kept for kind, gate in gates.kinds.items()}

    def before() -> None:
        gates.pass_all()
        if learned:
            gates.keep({kind: torch.ones_like(kept) for kind, kept in decided.items()})
            gates.harden()

    def after() -> None:
        gates.keep(decided)
        gates.harden()

    before()
    calls = capture_inputs(model, anatomy, inputs, whole)
    after()
    capture_inputs(model, anatomy, inputs, left)
    for block, block_calls in zip(anatomy.blocks, calls, strict=True):
        module = model.get_submodule(block.path)
        before()
        wanted, whole.batches = _outputs(module, block, whole.batches, block_calls)
        after()
        for site in block.sites:
            place = _Place.of(gates, block, site)
            if place is not None:
                _correct_site(module, place, left.batches, block_calls, wanted, damping)
        del wanted  # the largest thing here: gone before the next block's are made
        left.batches = [c(module, h) for c, h in zip(block_calls, left.batches, strict=True)]
    gates.pass_all()


@dataclass(frozen=True)
class _Place:
    """A site whose linears are fitted.

    Attributes:
        names: of its linears, which read the same input.
        reads: int64, the columns that are left of that input.
        scale: what gates multiply the outputs by [out], infinite where they are not kept; None
            where there is no gate behind them.
    """

    names: tuple[str, ...]
    reads: torch.Tensor
    scale: torch.Tensor | None

    @classmethod
    def of(cls, gates: Gates, block: BlockAnatomy, site: Site) -> _Place | None:
        """None where the sub-layer is gone, or nothing is known of the site."""
        if site.kind not in _SUBLAYERS:
            return None
        units, whole = _SUBLAYERS[site.kind]
        if whole in gates and not bool(gates[whole].of(gates[whole].kept, block.index)):
            return None
        stream = dict(gates.kinds.items()).get(HIDDEN)
        if site.kind in (QKV, UP):
            reads = torch.arange(block.hidden) if stream is None else stream.kept.nonzero()
            return cls(site.linears, reads.flatten(), None)
        columns = unit_columns(block, site.kind)
        if units in gates:
            columns = columns[gates[units].of(gates[units].kept, block.index).cpu()]
        scale = torch.ones(block.hidden, device=gates.multipliers.device)
        if whole in gates:
            scale = scale * gates[whole].of(gates[whole].mean, block.index)
        if stream is not None:
            scale = torch.where(stream.kept, scale * stream.mean, torch.inf)
        scale = torch.where(scale.abs() < _LEAST_MEAN, torch.inf, scale)
        return cls(site.linears, columns.flatten(), scale)


def _outputs(
    module: nn.Module, block: BlockAnatomy, entering: list[torch.Tensor], calls: list[BlockCall]
) -> tuple[dict[str, list[torch.Tensor]], list[torch.Tensor]]:
    """What its linears return for each batch [tokens, out], gates behind them included; and what
    leaves the block."""
    names = [name for site in block.sites for name in site.linears]
    found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    leaving = []
    for call, hidden in zip(calls, entering, strict=True):

        def keep(name: str, call: BlockCall = call):
            return lambda _module, _args, output: found[name].append(_flat(call.tokens(output)))

        handles = [module.get_submodule(n).register_forward_hook(keep(n)) for n in names]
        try:
            leaving.append(call(module, hidden))
        finally:
            for handle in handles:
                handle.remove()
    return found, leaving


def _correct_site(
    module: nn.Module,
    place: _Place,
    entering: list[torch.Tensor],
    calls: list[BlockCall],
    wanted: dict[str, list[torch.Tensor]],
    damping: float,
) -> None:
    """Fit the linears of one site to what they are to return."""
    linears = {name: module.get_submodule(name) for name in place.names}
    first, gram = linears[place.names[0]], torch.zeros(())
    errors = dict.fromkeys(place.names, torch.zeros(()))
    for index, (call, hidden) in enumerate(zip(calls, entering, strict=True)):
        values = _flat(call.tokens(_reaching(first, module, call, hidden)))
        reads = values[:, place.reads]
        reads = torch.cat([reads, reads.new_ones(len(reads), 1)], 1)
        gram = gram.to(reads) + reads.t() @ reads
        for name, linear in linears.items():
            target = wanted[name][index]
            if place.scale is not None:
                target = target / place.scale
            missing = target - linear.forward(values)  # past the gates behind it
            errors[name] = errors[name].to(reads) + missing.t() @ reads
    for name, linear in linears.items():
        change, shift = _fit(gram, errors[name], damping, linear.bias is not None, name)
        if place.scale is not None:
            change[place.scale.isinf()], shift[place.scale.isinf()] = 0.0, 0.0
        matrix(linear)[:, place.reads] += change.to(linear.weight.dtype)
        if linear.bias is not None:
            linear.bias.data += shift.to(linear.bias.dtype)


def _fit(
    gram: torch.Tensor, errors: torch.Tensor, damping: float, centred: bool, what: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Change of a weight [out, in] and of a bias [out] that makes up for errors.

    Args:
        gram: Z^T Z [in + 1, in + 1] of the inputs Z, the last of them 1.
        errors: E^T Z [out, in + 1] of what is missing in the outputs.
        centred: there is a bias.
    """
    gram, errors = gram.double(), errors.double()
    inner, cross = gram[:-1, :-1].clone(), errors[:, :-1]
    total, missed, count = gram[-1, :-1], errors[:, -1], gram[-1, -1]
    if centred:
        inner -= torch.outer(total, total) / count
        cross = cross - torch.outer(missed, total) / count
    mean = inner.diagonal().mean()
    inner.diagonal().add_(damping * (mean if mean > 0 else 1.0))
    change = torch.cholesky_solve(cross.t(), cholesky(inner, what)).t().contiguous()
    return change, (missed - change @ total) / count


def _reaching(
    linear: nn.Module, module: nn.Module, call: BlockCall, hidden: torch.Tensor
) -> torch.Tensor:
    """What a linear of a block is given; what lies behind it is not run."""
    reached: list[torch.Tensor] = []

    def stop(_module: nn.Module, args: tuple[Any, ...]) -> None:
        reached.append(args[0])
        raise _Reached

    handle = linear.register_forward_pre_hook(stop)
    try:
        call(module, hidden)
    except _Reached:
        return reached[0]
    finally:
        handle.remove()
    raise AssertionError("a linear that its block does not call")


def _flat(values: torch.Tensor) -> torch.Tensor:
    """[..., n] as [tokens, n]."""
    return values.reshape(-1, values.shape[-1]).float()
