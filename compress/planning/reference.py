"""Every key of a recipe with its type, default and meaning, read off the schema.

The tables of docs/recipes.md (`make keys` writes them) and of `compress recipes --keys` are made
here, so that neither can say what the code does not.
"""

from __future__ import annotations

import json
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from compress.data.examples_spec import ExamplesSpec
from compress.data.images import ImageSpec
from compress.data.text import TextSpec
from compress.methods.base import Method
from compress.methods.catalog import BUILT_IN, METHODS
from compress.planning.recipe import Recipe

BEGIN, END = "<!-- keys -->", "<!-- /keys -->"  # in docs/recipes.md
_WORDS = {bool: "true or false", int: "whole number", float: "number", str: "text"}
# Sections that their owner keeps as plain data until it knows which objective reads them.
_READ_AS = {"text": TextSpec, "images": ImageSpec, "examples": ExamplesSpec}
_EVALUATION = "evaluation"
_SCORED = "perplexity"  # where an EvaluationSpec keeps what recipes call `text`


class Key(NamedTuple):
    """One key of a section: its name, what may stand there in YAML's words, and what it means."""

    name: str
    kind: str
    default: str
    meaning: str


def sections() -> dict[str, tuple[Key, ...]]:
    """The keys of every section of a recipe by the section's place; "" is the recipe itself.

    A section that several places share (a text, a training) is listed at the first of them.
    """
    from compress.eval import EvaluationSpec

    found: dict[str, tuple[Key, ...]] = {}
    seen: dict[type[BaseModel], str] = {}
    _collect("", Recipe, found, seen)
    _collect(_EVALUATION, EvaluationSpec, found, seen)
    return found


def steps() -> dict[str, tuple[Key, ...]]:
    """The options of every method that comes with the package, by its name."""
    return {name: keys_of_method(name) for name in sorted(BUILT_IN)}


def keys_of_method(name: str) -> tuple[Key, ...]:
    """The options of any method.

    Raises:
        CompressError: there is none of that name.
    """
    method = METHODS.get(name)
    return tuple(_flat(method, owner=_as_by_default(method)))


def markdown() -> str:
    """All of it as tables."""
    parts = []
    for place, keys in sections().items():
        parts.append(f"### {f'`{place}`' if place else 'A recipe'}\n\n{_table(keys)}")
    for name, keys in steps().items():
        told = f"### step `{name}`\n\n{METHODS.summary(name)}: {METHODS.get(name).source}.\n"
        parts.append(f"{told}\n{_table(keys)}" if keys else f"{told}\nNo options.\n")
    return "\n".join(parts)


def renewed(page: str) -> str:
    """A document with the tables between its marks replaced by what is true now."""
    between = re.compile(f"(?<={re.escape(BEGIN)}\n).*(?={re.escape(END)})", re.DOTALL)
    return between.sub(lambda _: markdown(), page)


def kind_of_value(annotation: Any) -> str:
    """What may stand in YAML for a type: "whole number", "list of text", "`a` or `b`"."""
    if annotation in _WORDS:
        return _WORDS[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return kind_of_value(arguments[0])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        kinds = [kind_of_value(a) for a in arguments if a is not type(None)]
        return " or ".join(dict.fromkeys(kinds))
    if origin in (tuple, list, frozenset, set):
        return f"list of {kind_of_value(arguments[0])}" if arguments else "list"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    if annotation is type(None):
        return "nothing"
    return "text" if annotation is Path else "mapping"


def default_of(field: FieldInfo, name: str = "", owner: BaseModel | None = None) -> str:
    """A field's default as YAML would write it; of a section what differs from the defaults of its
    keys. What depends on other fields is read off an ``owner`` that was given none of them."""
    if field.is_required():
        return "required"
    value = field.default
    if field.default_factory is not None:
        made = field.default_factory
        if made in (dict, list, tuple):
            return json.dumps(made())
        if owner is None:
            return "depends"
        value = getattr(owner, name)
    if value is None:
        return ""
    if isinstance(value, BaseModel):
        given = value.model_dump(mode="json", exclude_defaults=True)
        return json.dumps(given, ensure_ascii=False) if given else "as below"
    return json.dumps(to_jsonable_python(value), ensure_ascii=False)


def _as_by_default(method: type[Method]) -> Method | None:
    """A step with no options but those it cannot do without; None where it has no such example."""
    try:
        return method.model_validate(method.example)
    except ValueError:
        return None


def _collect(
    place: str,
    model: type[BaseModel],
    found: dict[str, tuple[Key, ...]],
    seen: dict[type[BaseModel], str],
) -> None:
    seen[model] = place
    inner: list[tuple[str, type[BaseModel]]] = []
    for name, field in _fields(model):
        path = _below(place, name, field)
        inner += [(path, owned) for owned in _models(name, field) if owned not in seen]
    found[place] = ()  # sections stand in the order in which their names do
    for path, owned in inner:
        if owned not in seen:
            _collect(path, owned, found, seen)
    found[place] = tuple(_keys(model, place, seen))


def _keys(
    model: type[BaseModel],
    place: str,
    seen: dict[type[BaseModel], str],
    owner: BaseModel | None = None,
) -> Iterator[Key]:
    for name, field in _fields(model):
        path = _below(place, name, field)
        elsewhere = [seen[m] for m in _models(name, field) if seen.get(m, path) != path]
        kind = kind_of_value(field.annotation)
        if kind == "mapping" and (name in _READ_AS or name == _EVALUATION):
            kind = "section"
        meaning = field.description or ""
        if elsewhere:
            meaning += f"{'; ' if meaning else ''}keys as of `{elsewhere[0]}`"
        yield Key(name, kind, default_of(field, name, owner), meaning)


def _below(place: str, name: str, field: FieldInfo) -> str:
    """Where the keys under a key are; those of a mapping stand below names of the user's."""
    path = f"{place}.{name}" if place else name
    return f"{path}.NAME" if typing.get_origin(field.annotation) is dict else path


def _flat(
    model: type[BaseModel], prefix: str = "", owner: BaseModel | None = None
) -> Iterator[Key]:
    """Keys of a section and, behind each that is one itself, those inside: ``training.steps``."""
    fields = dict(_fields(model))
    for key in _keys(model, "", {}, owner):
        yield key._replace(name=prefix + key.name)
        for inner in _models(key.name, fields[key.name]):
            yield from _flat(inner, f"{prefix}{key.name}.")


def _fields(model: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        if name == _SCORED and kind_of_value(field.annotation) == "mapping":
            name = "text"
        yield field.alias or name, field


def _models(name: str, field: FieldInfo) -> list[type[BaseModel]]:
    """Sections that may stand under a key."""
    if name in _READ_AS and kind_of_value(field.annotation) == "mapping":
        return [_READ_AS[name]]
    if name == _EVALUATION:
        return []  # of an EvaluationSpec, which is collected by itself
    return [
        each
        for each in (field.annotation, *typing.get_args(field.annotation))
        if isinstance(each, type) and issubclass(each, BaseModel) and each is not Method
    ]


def _table(keys: tuple[Key, ...]) -> str:
    lines = ["| key | what it is | default | meaning |", "| --- | --- | --- | --- |"]
    for key in keys:
        default = key.default if key.default in ("", "required", "as below", "depends") else (
            f"`{key.default}`"
        )  # fmt: skip
        cells = (f"`{key.name}`", key.kind, default, key.meaning)
        lines.append("| " + " | ".join(map(_escaped, cells)) + " |")
    return "\n".join(lines) + "\n"


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(renewed(path.read_text(encoding="utf-8")), encoding="utf-8")
