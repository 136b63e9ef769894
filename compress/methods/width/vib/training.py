"""The trainings of a step on a whole model: gates, means, then the weights of the narrow one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from compress.methods.base import HEADS, HIDDEN
from compress.methods.width.vib.choosing import Choice, heads_by_order
from compress.methods.width.vib.correcting import correct
from compress.methods.width.vib.gates import ATTENTION, FFN, Gates
from compress.methods.width.vib.importance import fisher, start
from compress.methods.width.vib.learning import (
    OwnTeacher,
    Weights,
    chooser,
    constraint,
    expected_gone,
    gone,
    keep,
    opened,
    unit_weights,
    weights_now,
)
from compress.methods.width.vib.options import VIBOptions
from compress.methods.width.vib.placing import placed
from compress.methods.width.vib.pruning import learned_of_block
from compress.methods.width.vib.sizes import Sizes, outer_terms, sizes_of
from compress.models.outline import outline_of
from compress.train.moment import Moment, derive_seed
from compress.train.teacher import Teacher
from compress.train.whole import ModelWork, learn_language, training_source

_NAMED_HEADS = 12  # in the report


def target_of(method: VIBOptions, sizes: Sizes) -> float:
    """The size that may be left, in what the method counts."""
    if method.size is not None:
        return float(method.size)
    return sizes.whole() * (1 - method.share)


def learn_gates(work: ModelWork, method: VIBOptions) -> None:
    """Learn and decide; leaves what is to be done with each block, and outside, on the modules.

    Metrics: losses of the trainings; ``vib.size``, what is left as a share of the target; the share
    that was ``vib.expected`` to be gone and that which is ``vib.gone``; ``vib.threshold``, the log
    alpha from which on units went; what is ``told`` to the report.
    """
    work = replace(work, batches=_some(work.batches, method.data))
    sizes = _sizes(work, method)
    target = target_of(method, sizes)
    counts = {kind: sizes.full[kind].int().tolist() for kind in method.kinds}
    gates = Gates(counts, derive_seed(work.seed, "gates"), work.device)
    blocks = work.anatomy.blocks
    queries = blocks[0].heads // max(1, blocks[0].kv_heads)
    with placed(work.model, work.anatomy, gates):
        lesson = _Teaching(work, method, gates)
        if method.start == "importance":
            importance = fisher(work, gates, method.start_batches)
            share = 1 - target / sizes.whole()
            weights = unit_weights(gates, sizes)
            start(gates, importance, weights, share, method.margin, method.trust)
        if method.training is not None:
            _train(work, method, gates, sizes, target, lesson)
        decided = chooser(gates, sizes, target, method.multiples, method.uniform, queries).choose()
        keep(gates, decided)
        _note(work, method, gates, sizes, decided, target)
        if method.correction and decided.cuts:
            if method.remembers:
                lesson.remember(weights_now(work.model, work.anatomy))
            batches = _alike(work, method.correction_batches)
            learned = method.trains_weights
            correct(work.model, work.anatomy, gates, batches, method.damping, learned=learned)
        if method.tuning is not None:
            _tune(work, method, gates, lesson, decided)
    for block in blocks:
        found = learned_of_block(gates, decided, block.index)
        work.model.get_submodule(block.path).vib_learned = found
    if method.narrows_outer:
        outside = {n: t for n, t in found.items() if n.partition(".")[0] == HIDDEN}
        work.model.vib_learned = outside


def _some(batches: list[Any], share: float) -> list[Any]:
    """The first batches, as many as a share of all."""
    return batches[: max(1, math.ceil(share * len(batches)))]


def _alike(work: ModelWork, count: int) -> list[dict[str, torch.Tensor]]:
    """The examples of the first batches, those of like length together: little of it is padding."""
    chosen = work.batches[:count]
    source = training_source(replace(work, batches=chosen))
    lengths = getattr(source, "lengths", None)
    order = torch.arange(len(source)) if lengths is None else lengths.argsort(stable=True)
    size = len(next(iter(chosen[0].values())))
    return [source.get(part) for part in order.split(size)]


def _sizes(work: ModelWork, method: VIBOptions) -> Sizes:
    bits = 8 * work.storage_dtype.itemsize
    outline = outline_of(work.model, work.anatomy, bits)
    return sizes_of(outline, method.of, bits / 8, outer_terms(work.model, work.anatomy))


def learn_weights(work: ModelWork, method: VIBOptions) -> None:
    """Let the weights of the narrow model learn, taught by the one that the recipe began with.

    Metric: ``vib.fine_tune``, the mean loss of the last tenth of the steps.
    """
    work = replace(work, batches=_some(work.batches, method.data))
    teacher = None if method.tuned_from is None else work.original(method.tuned_from)
    with _learning(work, True) as weights:
        work.metrics["vib.fine_tune"] = learn_language(
            work, weights, method.fine_tune, method.tuned_from, name="fine_tune",
            prepare=lambda _moment: 0.0, taught_by=teacher,
        ).last_loss  # fmt: skip


class _Teaching:
    """Who teaches: the model itself with open gates, or, once weights learn, the original."""

    def __init__(self, work: ModelWork, method: VIBOptions, gates: Gates) -> None:
        self.gates, options = gates, method.distillation
        self.weights: Weights = ()
        self.taught_by: Teacher | None = None
        self.own = not method.trains_weights
        if options is None:
            return
        if self.own:
            self.taught_by = OwnTeacher.of(work.model, gates, options)
        else:
            self.taught_by = work.original(options)

    def remember(self, weights: Weights) -> None:
        """Teach with these weights, whatever the model's become."""
        self.weights = weights
        if isinstance(self.taught_by, OwnTeacher):
            self.taught_by = replace(self.taught_by, weights=weights)

    def inside(self):
        """Inside it the model is its own teacher, where it is one."""
        return opened(self.gates, self.weights) if self.own else nullcontext()


def _train(
    work: ModelWork, method: VIBOptions, gates: Gates, sizes: Sizes, target: float,
    lesson: _Teaching,
) -> None:  # fmt: skip
    """Gates, and in the modes full and fast weights with them, learn under the constraint."""
    options, schedule = method.training, method.schedule
    weights, wanted = unit_weights(gates, sizes), 1 - target / sizes.whole()
    total = sum(float(w.sum()) for w in weights.values())
    weights = {kind: w / total for kind, w in weights.items()}
    begin = min(gone(gates, sizes), wanted)

    def prepare(moment: Moment) -> torch.Tensor:
        sharp = schedule.sharp(moment)
        gates.draw(schedule.sharpness[1])
        gap = expected_gone(gates, sizes, sharp) - schedule.wanted(moment, begin, wanted)
        price = schedule.divergence * gates.divergence(weights)
        return -(price + constraint(gates, gap.float()))

    rate = options.learning_rate
    groups: list[dict[str, Any]] = [
        {"params": [g.log_variance for g in gates.kinds.values()], "lr": rate, "weight_decay": 0.0},
        {
            "params": [g.mean for g in gates.kinds.values()], "lr": rate * method.mean_rate,
            "weight_decay": 0.0,
        },
        {"params": [gates.multipliers], "lr": method.climb, "weight_decay": 0.0},
    ]  # fmt: skip
    with _learning(work, method.trains_weights) as free:
        if free:
            groups.append({"params": free, "lr": method.weight_rate})
        work.metrics["vib.loss"] = learn_language(
            work, groups, options, method.distillation, name="gates", prepare=prepare,
            teacher=lesson.inside, taught_by=lesson.taught_by,
        ).last_loss  # fmt: skip
    gates.pass_all()
    found = expected_gone(gates, sizes, schedule.sharpness[1]).detach()
    work.metrics["vib.expected"] = float(found)
    work.metrics["vib.multipliers"] = gates.multipliers.tolist()


def _tune(
    work: ModelWork, method: VIBOptions, gates: Gates, lesson: _Teaching, decided: Choice
) -> None:
    """With everything gone that goes, means learn on.

    A resumed run decides anew, on another machine perhaps with other roundings. Means that have
    learned for one decision are none for another, so each has a folder of its own.
    """

    def prepare(_moment: Moment) -> float:
        gates.harden()
        return 0.0

    folder = None if work.folder is None else work.folder / f"tuning-{decided.digest[:16]}"
    work.metrics["vib.tuning"] = learn_language(
        replace(work, folder=folder), [gate.mean for gate in gates.kinds.values()],
        method.tuning, method.distillation, name="tuning", prepare=prepare,
        teacher=lesson.inside, taught_by=lesson.taught_by,
    ).last_loss  # fmt: skip
    gates.pass_all()


@contextmanager
def _learning(work: ModelWork, weights: bool) -> Iterator[list[nn.Parameter]]:
    """The model's own parameters, which learn meanwhile; none where weights do not."""
    found = [
        p for n, p in work.model.named_parameters()
        if weights and p.is_floating_point() and not n.startswith("vib_gates")
    ]  # fmt: skip
    for parameter in found:
        parameter.requires_grad_(True)
    try:
        yield found
    finally:
        for parameter in found:
            parameter.requires_grad_(False)


def _note(
    work: ModelWork, method: VIBOptions, gates: Gates, sizes: Sizes, choice: Choice, target: float
) -> None:
    learned_gone = gone(gates, sizes)
    work.metrics |= {
        "vib.size": choice.amount / target,
        "vib.gone": 1 - choice.amount / sizes.whole(),
        "vib.crossed": learned_gone,
        "vib.threshold": min(max(choice.threshold, -1e9), 1e9),
    }
    kept = (
        f"kept {choice.amount:,.0f} of {sizes.whole():,.0f} {_COUNTED[method.of]}, "
        f"{100 * choice.amount / target:.2f} % of the target"
    )
    if method.training is None:
        how = "gates did not learn: what went is what importance put last"
    else:
        how = (
            f"{100 * learned_gone:.1f} % had more noise than signal, and the threshold that meets "
            f"the target is a log alpha of {choice.threshold:.2f} instead of 0"
        )
    said = [f"{kept}; {how}"]
    if HEADS in gates:
        scores = chooser(gates, sizes, target, {}, False, 1).scores[HEADS]
        first = [
            f"{block}.{unit}"
            for block, unit in heads_by_order(scores)
            if not bool(choice.kept[HEADS][block][unit])
            or (ATTENTION in choice.kept and not bool(choice.kept[ATTENTION][block]))
        ]
        if first:
            more = len(first) - _NAMED_HEADS
            said.append(
                f"heads (block.group) went in this order: {', '.join(first[:_NAMED_HEADS])}"
                + (f" and {more} more" if more > 0 else "")
            )
    for kind, name in ((ATTENTION, "attention"), (FFN, "FFN")):
        lost = [str(i) for i, row in enumerate(choice.kept.get(kind, [])) if not bool(row)]
        if lost:
            said.append(f"no {name} is left in blocks {', '.join(lost)}")
    if HIDDEN in choice.kept:
        row = choice.kept[HIDDEN][0]
        said.append(f"{int(row.sum())} of {len(row)} channels of the residual stream are left")
    work.metrics["told"] = said


_COUNTED = {
    "blocks": "parameters of blocks", "model": "parameters", "macs": "MACs a token",
    "bytes": "bytes",
}  # fmt: skip
