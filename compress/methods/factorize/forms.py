"""How large the two factors of a dense-sparse product are, from the bytes that they may take."""

from __future__ import annotations

from compress.linear.dense_sparse import stored_bytes
from compress.linear.dictionary import Form

# Of the bytes of a layer, those of its dictionary; and atoms for each input of a block. Chosen on
# linears of SmolLM2-135M at a half and at four fifths of the bytes (docs/dense_sparse.md).
SHARE, ATOMS = 0.3, 1.5
_MOST = 256  # atoms that uint8 tells apart


def form_for(
    out_features: int, in_features: int, ratio: float, value_bytes: int, width: int | None = None
) -> Form | None:
    """The form whose values and indices take at most ``ratio`` of a plain matrix's bytes.

    The dictionary gets about ``SHARE`` of them, which gives its atoms; inputs are cut into blocks
    with ``1 / ATOMS`` inputs for each; what is left is for the non-zeros. As these are whole
    numbers a block, what then remains goes to the dictionary.

    Args:
        value_bytes: of a stored value.
        width: inputs of a block, where that is given; the divisor of the inputs next to it is
            taken.

    Returns:
        None where the budget is too small for one non-zero a block.
    """
    budget = ratio * out_features * in_features * value_bytes
    atom = in_features * value_bytes  # bytes of one atom more in every block
    rank = max(1, min(_MOST, round(SHARE * budget / atom)))
    if width is not None:
        rank = max(1, min(_MOST, round(ATOMS * width)))
    blocks = in_features // _divisor(in_features, width or rank / ATOMS)
    entry = out_features * blocks * (value_bytes + 1)  # bytes of one non-zero more in every block
    nonzeros = min(rank, int((budget - rank * atom) / entry))
    if nonzeros < 1:
        return None
    rank = min(_MOST, int((budget - nonzeros * entry) / atom))
    form = Form(blocks, rank, nonzeros)
    assert size_of_form(out_features, in_features, form, value_bytes) <= budget
    return form


def size_of_form(out_features: int, in_features: int, form: Form, value_bytes: int) -> int:
    """Bytes of values and indices."""
    return stored_bytes(
        out_features, in_features, form.blocks, form.rank, form.nonzeros, value_bytes
    )


def _divisor(number: int, wanted: float) -> int:
    """The divisor of a number that is nearest to what is wanted, as a quotient."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: max(d / wanted, wanted / d))


def tables_of_form(
    out_features: int, in_features: int, form: Form
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes [out, in] of the linears that hold dictionary and values."""
    return (
        (form.blocks * form.rank, in_features // form.blocks),
        (out_features, form.blocks * form.nonzeros),
    )
