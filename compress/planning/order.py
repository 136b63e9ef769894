"""Which steps may follow which: a step must not undo what an earlier one made."""

from __future__ import annotations

from collections.abc import Collection

from compress.checkpoint.tensors_config import check_schemes
from compress.errors import CompressError
from compress.linear.grid import QuantScheme
from compress.linear.statistics import UNDERIVABLE
from compress.methods.base import MODULES, PRECISION, VALUES, WIDTH, ZEROS, Method
from compress.methods.quantize.base import QuantizeMethod
from compress.methods.questions import sites_of, targets_of
from compress.models.outline import Outline

# What an earlier step made, a later one would destroy: (earlier writes, later writes, why).
_CONFLICTS = (
    (PRECISION, VALUES, "would change weights that are rounded already"),
    (PRECISION, WIDTH, "would cut the groups of weights that are rounded already"),
    (PRECISION, MODULES, "would replace weights that are rounded already"),
    (ZEROS, MODULES, "would fill the zeros again"),
)


def check_needs(steps: tuple[Method, ...], has_calibration: bool) -> None:
    for number, method in enumerate(steps):
        if method.needs == "calibration" and not has_calibration:
            raise CompressError(
                "calibration inputs",
                f"none, and steps.{number} ({method.name}) observes the model's inputs",
                "In a recipe, add `calibration: {text: {source: FILE or data set}, samples: 128, "
                "length: 512}`; in Python, give compress.apply token ids as `calibration`; "
                "or use a method that needs no data (magnitude, rtn)",
            )


def check_order(steps: tuple[Method, ...], schemes: Collection[QuantScheme] = ()) -> None:
    """Refuse steps that destroy what earlier ones made, or whose results no checkpoint can have.

    Args:
        schemes: of what is quantised before the first step.

    Raises:
        CompressError: with the step.
    """
    for late, method in enumerate(steps):
        for early in range(late):
            earlier = steps[early]
            for made, touched, why in _CONFLICTS:
                if made not in earlier.writes or touched not in method.writes:
                    continue
                if made in method.spares:
                    continue  # it looks at each layer itself
                if PRECISION in method.writes and made == PRECISION:
                    continue  # two quantisers may share out the layers; each layer is checked
                raise CompressError(
                    "steps in an order in which none undoes another",
                    f"steps.{early} ({earlier.name}) before steps.{late} ({method.name}), which "
                    f"{why}",
                    f"Put {method.name} before {earlier.name}; the order that works is depth, "
                    "width, low rank, zeros, precision",
                )
    _check_mixture(steps, schemes)


def _check_mixture(steps: tuple[Method, ...], schemes: Collection[QuantScheme]) -> None:
    """Ask here what the config of each step's result would ask once all its blocks are done."""
    found = set(schemes)
    for number, method in enumerate(steps):
        if isinstance(method, QuantizeMethod):
            found.add(method.scheme)
        try:
            check_schemes(found)
        except CompressError as error:
            raise error.within(f"steps.{number} ({method.name})") from None


def check_rounded(method: Method, outline: Outline) -> None:
    """Refuse to change weights that were rounded before the first step."""
    reasons = [why for made, touched, why in _CONFLICTS
               if made == PRECISION and touched in method.writes]  # fmt: skip
    if not reasons or PRECISION in method.writes | method.spares:
        return  # a quantiser, or what spares rounded layers, looks at each itself
    for block in outline.blocks:
        for name in targets_of(method.passes(), block.anatomy):
            if block.linears[name].quantized:
                raise CompressError(
                    "layers in floating point",
                    f"{block.anatomy.path}.{name}, which is quantised: {method.name} {reasons[0]}",
                    "Start from the model before it was quantised",
                )


def check_ranges(method: Method, outline: Outline) -> None:
    """Refuse what cannot be derived for the inner ones of layers of several linears.

    Raises:
        CompressError: with the layer.
    """
    for action in sites_of(method.passes()):
        for block in outline.blocks:
            for site in block.anatomy.sites:
                if (kind := action.statistic(site)) not in UNDERIVABLE:
                    continue
                for name in action.targets(block.anatomy, site):
                    linear = block.linears[name]
                    if len(linear.parts) > 1:
                        raise CompressError(
                            f"plain linears, of whose inputs {method.name} has to know the {kind}",
                            f"{block.anatomy.path}.{name}, in whose place an earlier step has put "
                            f"a layer of kind {linear.layer}",
                            f"Exclude it, or put {method.name} before that step",
                        )
