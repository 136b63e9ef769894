"""Whether a step can do its work on a model, and on how much of it: decided from shapes alone.

Plans, live models and `compress inspect` ask the same functions, so that none says yes where
another refuses.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from compress.errors import CompressError, did_you_mean
from compress.linear.quantized import scheme_of
from compress.linear.statistics import NOTHING
from compress.methods.base import LinearMethod, Method, matches
from compress.methods.questions import carries_inputs, sites_of, targets_of
from compress.models.anatomy import Anatomy
from compress.models.dry_run import linears_never_called
from compress.models.families import FAMILIES
from compress.models.outline import Outline, outline_of
from compress.models.stream import StreamedModel
from compress.models.supported import check_kind
from compress.planning.order import check_needs, check_order, check_ranges, check_rounded
from compress.planning.rehearsal import rehearse_method


def check_step(method: Method, streamed: StreamedModel, outline: Outline) -> Outline:
    """Return the outline after a step, with a note of what it leaves alone.

    Args:
        outline: of the model that enters the step.

    Raises:
        CompressError: the model's family or its widths do not support the step, a pattern matches
            nothing, or the step would change weights that are rounded.
    """
    method.check(streamed.anatomy, outline)
    check_shared(method, streamed.anatomy)
    check_called(method, streamed.model, streamed.anatomy)
    check_patterns(method, streamed.anatomy, streamed.model)
    check_rounded(method, outline)
    check_ranges(method, outline)
    rehearse_method(method, streamed.model)
    after = method.predict(outline)
    note = left_alone(method, outline)
    return replace(after, notes=(*after.notes, note)) if note else after


def check_steps(steps: tuple[Method, ...], streamed: StreamedModel, has_calibration: bool) -> None:
    """Refuse steps that cannot work on a live model, before any of them starts.

    Warns of what they leave alone.

    Raises:
        CompressError: as :func:`compress.planning.planner.plan`.
    """
    check_kind(streamed.model)
    check_needs(steps, has_calibration)
    rounded = {scheme_of(module) for module in streamed.model.modules()} - {None}
    check_order(steps, rounded)
    outline = outline_of(streamed.model, streamed.anatomy, 32)
    for number, method in enumerate(steps):
        note = left_alone(method, outline)
        if note:
            warnings.warn(note, stacklevel=3)
        outline = passed(number, method, streamed, outline)


def passed(number: int, method: Method, streamed: StreamedModel, outline: Outline) -> Outline:
    """The outline behind a step: the one check of recipes and live models."""
    try:
        return check_step(method, streamed, outline)
    except CompressError as error:
        raise error.within(f"steps.{number} ({method.name})") from None


def check_shared(method: Method, anatomy: Anatomy) -> None:
    """Refuse to carry inputs from layer to layer where all layers are one.

    Raises:
        CompressError: naming the type.
    """
    if anatomy.family.shared_blocks and carries_inputs(method.passes()):
        raise CompressError(
            "a model whose layers have weights of their own",
            f"{anatomy.model_type}, whose layers share one set",
            "Use a method that needs no calibration (magnitude, rtn)",
        )


def check_called(method: Method, model: PreTrainedModel, anatomy: Anatomy) -> None:
    """Refuse to calibrate a linear whose class reads its weight without calling it.

    Families of the table call theirs. Experts to which no token is sent are a matter of the
    calibration data, and found while it runs.

    Raises:
        CompressError: with the option that leaves the linear out.
    """
    if anatomy.model_type in FAMILIES:
        return
    wanted: dict[str, str] = {}
    for action in sites_of(method.passes()):
        for block in anatomy.blocks:
            for site in block.sites:
                if action.statistic(site) != NOTHING:
                    for name in action.targets(block, site):
                        wanted.setdefault(name, f"{block.path}.{name}")
    paths = tuple(block.path for block in anatomy.blocks)
    if not wanted:
        return
    for name in sorted(wanted.keys() & linears_never_called(type(model), model.config, paths)):
        raise CompressError(
            "linears that the model calls, so that calibration sees their inputs",
            f"{wanted[name]}, whose weight a {type(model).__name__} uses without calling it",
            f'Exclude it (exclude: ["*.{name}"]), or use a method that needs no calibration '
            "(magnitude, rtn)",
        )


def check_patterns(method: Method, anatomy: Anatomy, model: nn.Module) -> None:
    """Refuse a pattern of include or exclude that names nothing: a slip that would go unnoticed.

    A pattern of exclude may also name what no step touches, such as the head.

    Raises:
        CompressError: with the closest path.
    """
    if not isinstance(method, LinearMethod):
        return
    linears = [f"{b.path}.{name}" for b in anatomy.blocks for name in b.linears]
    modules: list[str] = []
    for option in ("include", "exclude"):
        for pattern in getattr(method, option):
            if any(matches(path, (pattern,)) for path in linears):
                continue
            modules = modules or [name for name, _ in model.named_modules() if name]
            if option == "exclude" and any(matches(path, (pattern,)) for path in modules):
                continue
            leaves = sorted({path.rpartition(".")[2] for path in linears})
            close = did_you_mean(pattern.removeprefix("re:").strip("*^$."), leaves)
            raise CompressError(
                f"patterns under {option} that match a linear inside a block",
                f"{pattern!r}, which matches none",
                f"{close} Paths look like {linears[0]}" if linears else "",
            )


def left_alone(method: Method, outline: Outline) -> str | None:
    """Say what share of the weights a step on linears does not reach, where that is notable.

    Weights outside blocks and biases are not counted: no such step is expected to change them. What
    is left are the linears that patterns exclude, and weights that are no linears (the experts of a
    mixture, which transformers keeps as one tensor).

    Returns:
        A sentence without a full stop; None where the step reaches nine tenths of the weights.
    """
    if not isinstance(method, LinearMethod):
        return None
    reached = total = unknown = 0
    for block in outline.blocks:
        targets = set(targets_of(method.passes(), block.anatomy))
        reached += sum(block.linears[n].weights for n in targets)
        total += sum(linear.weights for linear in block.linears.values()) + block.other_parameters
        unknown += block.other_parameters
    if reached >= 0.9 * total:
        return None
    note = (
        f"{method.name}: reaches {100 * reached / total:.1f} % of the weights in blocks and leaves "
        f"{100 * (total - reached) / total:.1f} % alone"
    )
    if unknown > 0.1 * total:
        note += (
            f"; {100 * unknown / total:.1f} % are in no linear layer (experts of a mixture, or "
            "parameters of the family's own), which no step changes"
        )
    return note
