"""What the labels of a data set are to a head: which of its answers is right."""

from __future__ import annotations

from collections.abc import Sequence

from compress.data.examples import Examples
from compress.errors import CompressError


def label_names(examples: Examples) -> tuple[str, ...]:
    """The labels of training data in the order of their numbers: the source's own, or whole
    numbers from 0 upwards, or the names that occur in alphabetical order.

    Raises:
        CompressError: numbers that are no labels, or a single label.
    """
    if examples.names:
        return examples.names
    labels = examples.flat_labels
    numbers = _whole(labels)
    if numbers is None and any(isinstance(label, float) for label in labels):
        raise CompressError(
            "labels that are names or whole numbers", f"{labels[0]!r}",
            "Where a number is to be predicted, set examples.labels: number",
        )  # fmt: skip
    if numbers is not None:
        names = tuple(str(number) for number in range(max(numbers) + 1))
        if min(numbers) < 0 or len(names) > len(labels):
            raise CompressError(
                "labels from 0 upwards", f"labels from {min(numbers)} to {max(numbers)}",
                "The test splits of GLUE have no labels: choose another split; where a number is "
                "to be predicted, set examples.labels: number",
            )  # fmt: skip
    else:
        names = tuple(sorted({str(label) for label in labels}))
    if len(names) < 2:
        raise CompressError("examples of at least two labels", f"{names[0]!r} alone")
    return names


def _whole(labels: Sequence[str | float]) -> list[int] | None:
    """Labels as whole numbers; None where one is something else."""
    try:
        found = [float(label) for label in labels]
    except ValueError:
        return None
    return [int(x) for x in found] if all(x.is_integer() for x in found) else None


def label_values(examples: Examples, names: tuple[str, ...]) -> list[float]:
    """What a head with these labels should answer, text by text or word by word: numbers of its
    labels, or the numbers to be predicted where it has no labels.

    Where head and data name the same labels, the names decide, for the numbers may differ (they do
    between MNLI models and MNLI). Else numbers are numbers of the head's labels.

    Args:
        names: of the head's labels by number; empty for a regression.

    Raises:
        CompressError: a label that the head does not have, or that is no number.
    """
    labels = examples.flat_labels
    if not names:
        return [_number(label) for label in labels]
    order = {name.casefold(): number for number, name in enumerate(names)}
    own = [name.casefold() for name in examples.names]
    shared = bool(own) and set(own) <= order.keys()
    numbers = _whole(labels)
    if own and len(own) > len(names):
        raise CompressError(
            f"a head of at least {len(own)} labels ({', '.join(examples.names)})",
            f"{len(names)} ({', '.join(names)})", "Use a model that was trained for this task",
        )  # fmt: skip
    found = []
    for index, label in enumerate(labels):
        name = str(label).casefold()
        number = None if numbers is None else numbers[index]
        if number is not None and shared and 0 <= number < len(own):
            name = own[number]
        if name in order:
            found.append(order[name])
        elif name in own:
            found.append(own.index(name))
        elif number is not None and 0 <= number < len(names):
            found.append(number)
        else:
            raise CompressError(
                f"labels among the {len(names)} of the head ({', '.join(names[:6])})",
                f"{label!r} in example {index + 1}",
                "Use a model that was trained on these labels, name the labels in their order "
                "(examples.labels), or choose a split that has labels",
            )
    return [float(number) for number in found]


def _number(label: str | float) -> float:
    try:
        return float(label)
    except ValueError:
        raise CompressError(
            "a number as the label of each example, for a head that predicts one", repr(label),
            "Use a model with a head for these labels",
        ) from None  # fmt: skip
