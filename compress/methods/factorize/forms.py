"""How large the two factors of a dense-sparse product are, from the bytes that they may take."""

from __future__ import annotations

from compress.linear.dictionary import Form

# Of the bytes of a layer, those of its dictionary; inputs of a block, at most. Both, and atoms for
# each input (`atoms` of the method), chosen on linears of SmolLM2-135M (docs/dense_sparse.md).
SHARE, WIDEST = 0.3, 64
_MOST = 256  # atoms that uint8 tells apart
_FEWEST = 4  # non-zeros a block, where there is room: one more or less is a quarter of them


def form_for(
    out_features: int,
    in_features: int,
    ratio: float,
    value_bytes: int,
    atoms: float,
    width: int | None = None,
) -> Form | None:
    """The form whose values and indices take at most ``ratio`` of a plain matrix's bytes.

    The dictionary gets about ``SHARE`` of them, which gives its atoms; inputs are cut into blocks
    with ``1 / atoms`` inputs for each, or wider ones where an output could take only a few atoms of
    a block; what is left is for the non-zeros. As these are whole numbers a block, what then
    remains goes to the dictionary.

    Args:
        value_bytes: of a stored value.
        atoms: for each input of a block.
        width: inputs of a block, where that is given; the divisor of the inputs next to it is
            taken.

    Returns:
        None where the budget is too small for one non-zero a block.
    """
    budget = ratio * out_features * in_features * value_bytes
    atom = in_features * value_bytes  # bytes of one atom more in every block
    wanted = min(SHARE * budget / atom, atoms * WIDEST) if width is None else atoms * width
    rank = max(1, min(_MOST, round(wanted)))
    divisors = [d for d in range(1, in_features + 1) if in_features % d == 0]
    target = width or rank / atoms
    nearest = min(divisors, key=lambda d: max(d / target, target / d))
    found = None
    for block in divisors:
        if block < nearest:
            continue
        blocks = in_features // block
        entry = out_features * blocks * (value_bytes + 1)  # of one non-zero more in every block
        nonzeros = min(rank, int((budget - rank * atom) / entry))
        if nonzeros >= 1:
            most = min(_MOST, int((budget - nonzeros * entry) / atom))
            found = Form(blocks, most, nonzeros)
        if width is not None or nonzeros >= _FEWEST:
            break
    return found


def tables_of_form(
    out_features: int, in_features: int, form: Form
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes [out, in] of the linears that hold dictionary and values."""
    return (
        (form.blocks * form.rank, in_features // form.blocks),
        (out_features, form.blocks * form.nonzeros),
    )
