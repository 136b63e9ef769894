"""What a class must say about itself to be taken for a method; looked at before it is used."""

from __future__ import annotations

import re
from typing import Any

from compress.errors import CompressError
from compress.methods.base import (
    CALIBRATION,
    DEPTH,
    EXPERTS,
    HEADS,
    HIDDEN,
    MODULES,
    NEURONS,
    PRECISION,
    VALUES,
    WIDTH,
    ZEROS,
    Method,
)

WIDTHS = frozenset({HEADS, NEURONS, HIDDEN, EXPERTS})
KINDS = frozenset({VALUES, ZEROS, WIDTH, DEPTH, MODULES, PRECISION})


def check_class(cls: Any) -> None:
    """Refuse what is no complete method class.

    Raises:
        CompressError: no subclass of Method; a class attribute that is missing or says nothing
            known; an option called ``method``, which recipes could not give.
    """
    if not isinstance(cls, type) or not issubclass(cls, Method):
        raise CompressError(
            "a class derived from compress.methods.base.Method", repr(cls)[:100],
            "Derive the class from Method, LinearMethod or the base of another method",
        )  # fmt: skip
    where = f"{cls.__module__}.{cls.__qualname__}"
    for attribute in ("name", "summary", "source"):
        said = getattr(cls, attribute, None)
        if not isinstance(said, str) or not said.strip():
            raise CompressError(f"a text as class attribute `{attribute}`", repr(said), where=where)
    if not re.fullmatch(r"[A-Za-z]\w*", cls.name, re.ASCII):
        raise CompressError(
            "a name of letters, digits and underscores", repr(cls.name), where=where
        )
    if not isinstance(writes := getattr(cls, "writes", None), (set, frozenset)) or writes - KINDS:
        raise CompressError(
            f"a set out of {', '.join(sorted(KINDS))} as class attribute `writes`",
            repr(writes), where=where,
        )  # fmt: skip
    if cls.needs not in ("nothing", CALIBRATION):
        raise CompressError(
            f"nothing or {CALIBRATION} as class attribute `needs`", repr(cls.needs), where=where
        )
    if missing := sorted(cls.__abstractmethods__):
        raise CompressError(
            f"functions that the base leaves to the class ({', '.join(missing)})", "none",
            "Write them, or derive from a base that has them", where=where,
        )  # fmt: skip
    narrows = getattr(cls, "narrows", None)
    if not isinstance(narrows, (set, frozenset)) or narrows - WIDTHS:
        raise CompressError(
            f"`narrows` to be a set out of {', '.join(sorted(WIDTHS))}", repr(narrows), where=where
        )
    if WIDTH in writes and DEPTH not in writes and not narrows:
        raise CompressError(
            "what becomes narrower, of a method that writes width", "an empty set `narrows`",
            f"Name it, out of {', '.join(sorted(WIDTHS))}", where=where,
        )  # fmt: skip
    if "method" in cls.model_fields:
        raise CompressError(
            "options of other names than `method`", "one of that name",
            "In a recipe `method` names the method itself", where=where,
        )  # fmt: skip
