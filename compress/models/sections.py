"""The parts of a config.json that this toolkit writes, looked at before anything is built of them.

What is written here is well formed; a file can have been edited, or written by somebody else.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from compress.errors import CompressError
from compress.linear.layer import parse_spec
from compress.models.described import KEY, parse_family


def check_sections(fields: dict[str, Any], layers: int | None, where: str) -> None:
    """Refuse sections of another shape than the toolkit writes.

    Args:
        fields: the parsed config.json.
        layers: how many the model has; None if its config does not say.
        where: the file's path, for the error.

    Raises:
        CompressError: naming the entry.
    """
    modules = fields.get("compressed_modules")
    if modules is not None:
        _mapping(modules, "compressed_modules", where)
        for name, spec in modules.items():
            _check_module(name, spec, layers, where)
    if fields.get(KEY) is not None:
        parse_family(_mapping(fields[KEY], KEY, where), f"{where}, {KEY}")
    section = fields.get("compress")
    if section is None:
        return
    head_dim = _mapping(section, "compress", where).get("head_dim", 1)
    if not isinstance(head_dim, int) or isinstance(head_dim, bool) or head_dim < 1:
        raise _refused("compress.head_dim to be the size of a head", head_dim, where)
    zeros = section.get("zeros") or {}
    for pattern, targets in _mapping(zeros, "compress.zeros", where).items():
        if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
            raise _refused(f"compress.zeros.{pattern} to be a list of patterns", targets, where)


def _check_module(name: str, spec: Any, layers: int | None, where: str) -> None:
    index, _, path = name.partition(".")
    place = f"compressed_modules.{name}"
    if not index.isdecimal() or not path or (layers is not None and int(index) >= layers):
        last = "" if layers is None else f" (from 0 to {layers - 1})"
        raise _refused(f"{place} to name a layer by its number{last} and a path in it", name, where)
    try:
        parse_spec(_mapping(spec, place, where))
    except CompressError as error:
        raise error.within(f"{where}, {place}.kind") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise _refused(
            f"{place}.{field} to be valid ({first['msg']})", first["input"], where
        ) from None


def _mapping(value: Any, name: str, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _refused(f"{name} to be an object", value, where)
    return value


def _refused(expected: str, got: Any, where: str) -> CompressError:
    return CompressError(
        expected,
        f"{got!r:.80}",
        "Fetch config.json again, or write the checkpoint anew",
        where=where,
    )
