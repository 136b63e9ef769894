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

    Whether labels are names or numbers is decided once, for all of them. Where head and data name
    the same labels, the names decide which is which, for the numbers may differ (they do between
    MNLI models and MNLI). Else numbers are numbers of the head's labels. Where the data name no
    labels, they are names if the head has all of them by name ("1" to "5", of a head of stars),
    and else numbers.

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
    # One may have labels that the other lacks; the numbers of both are told by name then.
    shared = bool(own) and (set(own) <= order.keys() or order.keys() <= set(own))
    if len(own) > len(names) and not shared:
        raise CompressError(
            f"a head of at least {len(own)} labels ({', '.join(examples.names)})",
            f"{len(names)} ({', '.join(names)})", "Use a model that was trained for this task",
        )  # fmt: skip
    told = [str(label).casefold() for label in labels]
    indices = _indices(labels, told, own) if own else None
    if indices is not None:
        # A label that the head lacks is left as it is, to be refused.
        found = [order.get(own[i]) if shared else i for i in indices]
    elif all(name in order for name in told):
        found = [order[name] for name in told]
    else:
        numbers = _whole(labels)
        most = len(own) if shared else len(names)
        found = (
            [n if 0 <= n < most else None for n in numbers]
            if numbers is not None
            else [order.get(name) for name in told]
        )
    if None in found:
        index = found.index(None)
        raise CompressError(
            f"labels among the {len(names)} of the head ({', '.join(names[:6])})",
            f"{labels[index]!r} in example {index + 1}",
            "Use a model that was trained on these labels, name the labels in their order "
            "(examples.labels), or choose a split that has labels",
        )
    return [float(number) for number in found if number is not None]


def _indices(
    labels: Sequence[str | float], told: Sequence[str], own: Sequence[str]
) -> list[int] | None:
    """Labels as numbers of the names that the data give; None where they are something else."""
    numbers = _whole(labels)
    if numbers is not None and not all(0 <= number < len(own) for number in numbers):
        numbers = None
    named = all(name in own for name in told)
    # What is written as a number may be a name ("1" to "5", of stars); a number is none at first.
    if numbers is not None and not (named and any(isinstance(label, str) for label in labels)):
        return numbers
    return [own.index(name) for name in told] if named else None


def _number(label: str | float) -> float:
    try:
        return float(label)
    except ValueError:
        raise CompressError(
            "a number as the label of each example, for a head that predicts one", repr(label),
            "Use a model with a head for these labels",
        ) from None  # fmt: skip
