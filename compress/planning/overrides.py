"""Values given beside a recipe: ``--set steps.0.sparsity=0.6``."""

from __future__ import annotations

from typing import Any

from compress.errors import CompressError
from compress.planning import recipe_yaml


def override(data: Any, text: str) -> None:
    """Apply ``a.0.b=value`` (the value is YAML) to nested plain data.

    Raises:
        CompressError: no such form, no such place, or a value that does not parse.
    """
    path, separator, value = text.partition("=")
    if not separator or not path:
        raise CompressError("--set KEY.PATH=VALUE, as in --set steps.0.sparsity=0.6", repr(text))
    *parents, last = path.split(".")
    target = data
    for part in parents:
        if isinstance(target, list):
            target = target[_index(target, part, text)]
        elif isinstance(target, dict):
            if isinstance(target.get(part), str) and part == "model":
                target[part] = {"source": target[part]}
            target = target.setdefault(part, {})
        else:
            raise CompressError("--set to name a place in the recipe", repr(text))
    try:
        parsed = recipe_yaml.parse(value)
    except ValueError as error:
        raise CompressError("a YAML value in --set", f"{text[:200]!r}: {error}") from None
    if isinstance(target, list):
        target[_index(target, last, text)] = parsed
    elif isinstance(target, dict):
        target[last] = parsed
    else:
        raise CompressError("--set to name a place in the recipe", repr(text))


def _index(target: list, part: str, text: str) -> int:
    if not (part.isascii() and part.isdigit()) or int(part[:9]) >= len(target):
        raise CompressError(
            f"an index from 0 to {len(target) - 1} in --set", f"{part!r} in {text!r}"
        )
    return int(part)
