"""Whether a step can do its work on a model, and on how much of it: decided from shapes alone.

Plans, live models and `compress inspect` ask the same functions, so that none says yes where
another refuses.
"""

from __future__ import annotations

from dataclasses import replace

from compress.checkpoint.rehearsal import rehearse_method
from compress.methods.base import LinearMethod, Method
from compress.models.stream import StreamedModel
from compress.outline import Outline


def check_step(method: Method, streamed: StreamedModel, outline: Outline) -> Outline:
    """Return the outline after a step, with a note of what it leaves alone.

    Args:
        outline: of the model that enters the step.

    Raises:
        CompressError: the model's family or its widths do not support the step.
    """
    method.check(streamed.anatomy, outline)
    rehearse_method(method, streamed.model.config)
    after = method.predict(outline)
    note = left_alone(method, outline)
    return replace(after, notes=(*after.notes, note)) if note else after


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
        targets = {n for s in block.anatomy.sites for n in method.targets(block.anatomy, s)}
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
